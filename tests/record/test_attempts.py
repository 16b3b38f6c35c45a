"""Each start of a run keeps its configuration and its facts, however often the directory is restarted."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.errors import DataError
from kha_train.record import Record, read_attempts, read_run


def start(run_dir: Path, config: dict[str, Any] | None, **facts: Any) -> None:
    """One start of `run_dir` that trains nothing."""
    record = Record.open(run_dir)
    record.begin_attempt(0, facts=facts, config=config)
    record.close("requeued")


def configuration(*overrides: str) -> dict[str, Any]:
    return to_plain(compose(["run.name=one", "run.dir=runs/one", *overrides]))


def test_every_start_reads_back_the_configuration_it_was_given(tmp_path: Path) -> None:
    given = [
        configuration(),
        configuration("optim.lr=0.02", "attention=kha_mlp"),
        configuration("data.sources=[{name: a, path: x, weight: 1.0}]", "data.train=''"),
        configuration(),
    ]
    for config in given:
        start(tmp_path, config)
    found = read_attempts(tmp_path)
    assert list(found) == [1, 2, 3, 4]
    assert [attempt.config for attempt in found.values()] == given


def test_a_thousand_restarts_of_one_command_add_no_configuration_to_the_file(tmp_path: Path) -> None:
    start(tmp_path, configuration())
    start(tmp_path, configuration())
    kept = read_run(tmp_path)["attempts"][1]["config"]
    assert kept == {"like": 1, "changed": {}, "without": []}
    start(tmp_path, configuration("optim.lr=0.02"))
    start(tmp_path, configuration("optim.lr=0.03"))
    assert read_run(tmp_path)["attempts"][3]["config"]["changed"] == {"optim.lr": 0.03}


def test_facts_of_a_start_are_its_own_and_not_those_of_the_starts_between(tmp_path: Path) -> None:
    for content_id in ("first", "second", "first"):
        start(tmp_path, None, data_content_id=content_id)
    assert [attempt.facts["data_content_id"] for attempt in read_attempts(tmp_path).values()] == [
        "first",
        "second",
        "first",
    ]


def test_no_secret_of_a_configuration_reaches_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_API_KEY", "canary-4711-canary")
    start(tmp_path, {"data": {"train": "s3://canary-4711-canary/x"}, "store": {"password": "swordfish"}})
    start(tmp_path, {"data": {"train": "https://me:swordfish@host/x"}, "store": {"password": "swordfish2"}})
    text = (tmp_path / "run.json").read_text()
    assert "canary-4711" not in text and "swordfish" not in text
    assert read_attempts(tmp_path)[1].config["store"] == {"password": "[redacted]"}


def old_run(run_dir: Path, starts: int, last: dict[str, Any]) -> None:
    """A run directory of a release that kept the configuration of the last start alone, in config.yaml."""
    for _ in range(starts):
        start(run_dir, None)
    run = json.loads((run_dir / "run.json").read_text())
    assert not any("config" in attempt for attempt in run["attempts"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(last))


def test_of_an_older_release_the_last_start_alone_is_known(tmp_path: Path) -> None:
    last = configuration("optim.lr=0.5")
    old_run(tmp_path, 3, last)
    assert [attempt.config for attempt in read_attempts(tmp_path).values()] == [None, None, last]


def test_a_start_saves_what_it_knows_of_the_start_of_an_older_release_before_it(tmp_path: Path) -> None:
    before, now = configuration("optim.lr=0.5"), configuration()
    old_run(tmp_path, 2, before)
    start(tmp_path, now)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(now))
    assert [attempt.config for attempt in read_attempts(tmp_path).values()] == [None, before, now]


def test_a_start_that_ends_before_it_replaces_config_yaml_is_not_confused_with_the_one_before(tmp_path: Path) -> None:
    first, second = configuration(), configuration("optim.lr=0.5")
    start(tmp_path, first)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first))
    start(tmp_path, second)
    start(tmp_path, first)
    assert [attempt.config for attempt in read_attempts(tmp_path).values()] == [first, second, first]


def test_a_damaged_config_yaml_of_an_older_release_keeps_nobody_from_going_on(tmp_path: Path) -> None:
    old_run(tmp_path, 1, {})
    (tmp_path / "config.yaml").write_bytes(b"run: [\xff")
    now = configuration()
    start(tmp_path, now)
    assert [attempt.config for attempt in read_attempts(tmp_path).values()] == [None, now]


plain_configuration = cache(configuration)
WORDS = st.sampled_from(["nan", "inf", "-inf", "\\nan", "\\\\inf", "NaN", "Infinity"])
TEXT = WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@example("nan", ["inf"], float("-inf"), "-inf")
@settings(max_examples=25, deadline=None)
@given(TEXT, st.lists(TEXT, max_size=3), st.floats(), TEXT)
def test_any_text_and_any_number_of_a_configuration_read_back_as_they_were(
    name: str, tags: list[str], number: float, source: str
) -> None:
    def with_values(base: dict[str, Any], name: str) -> dict[str, Any]:
        sources = [{"name": source, "path": "x", "weight": number}]
        return {
            **base,
            "run": {**base["run"], "name": name},
            "optim": {**base["optim"], "lr": number},
            "data": {**base["data"], "sources": sources},
            "telemetry": {**base["telemetry"], "wandb": {**base["telemetry"]["wandb"], "tags": tags, "group": source}},
        }

    base = plain_configuration()
    given_configs = [with_values(base, "first"), with_values(base, name)]
    with tempfile.TemporaryDirectory() as directory:
        for config in given_configs:
            start(Path(directory), config, command=name)
        found = read_attempts(Path(directory))
    assert [repr(attempt.config) for attempt in found.values()] == [repr(config) for config in given_configs]
    assert {attempt.facts["command"] for attempt in found.values()} == {name}


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_record_that_kept_a_name_as_a_bare_word_reads_as_that_name(word: str, tmp_path: Path) -> None:
    config = configuration()
    config["run"]["name"] = word
    start(tmp_path, config)
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace(f'"\\\\{word}"', f'"{word}"'))
    assert f'"name": "{word}"' in file.read_text()
    (attempt,) = read_attempts(tmp_path).values()
    assert attempt.config["run"]["name"] == word
    start(tmp_path, config)
    assert [one.config["run"]["name"] for one in read_attempts(tmp_path).values()] == [word, word]


def test_an_error_about_a_configuration_names_the_field_that_is_wrong(tmp_path: Path) -> None:
    start(tmp_path, {**configuration(), "attention": []})
    with pytest.raises(DataError, match=r"attempts\[0\]\.config\.whole\.attention"):
        read_attempts(tmp_path)
