"""A/A runs tell how large differences are that mean nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kha_train.analysis.certify.null import command_for_null, nulls_of
from kha_train.analysis.compare import compare_runs
from kha_train.analysis.runs import load_runs
from kha_train.cli.main import run
from kha_train.errors import ConfigError
from kha_train.record import Record

STEPS = 20


def made(path: Path, level: float, variant: str = "gqa", **seeds: Any) -> Path:
    """A run whose train loss is `level` at every step."""
    seed, data_seed = seeds.get("seed", 0), seeds.get("data_seed")
    record = Record.open(path)
    facts = {"data_content_id": "c0ffee", "command": "python -m kha_train attention=gqa run.dir=old data.seed=3"}
    record.begin_attempt(0, facts=facts)
    config = {"run": {"dir": str(path), "name": path.name, "seed": seed}, "attention": {"name": variant}}
    config |= {"data": {"isolate_documents": True, "seed": data_seed}, "model": {"seq_len": 8}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    for step in range(1, seeds.get("steps", STEPS) + 1):
        first = 4 * (step - 1)
        line = {"step": step, "samples_first": first, "samples_last": first + 3, "tokens": 32 * step}
        record.step(line | {"train/loss": level, "train/skipped": 0, "train/step_seconds": 0.1})
    record.close("done")
    return path


@pytest.fixture
def arms(tmp_path: Path) -> list[Path]:
    """Two variants, three seeds each; the second is lower by 0.10, 0.11 and 0.12."""
    return [
        made(tmp_path / f"{variant}{seed}", 2.0 - (variant == "kha") * (0.1 + seed / 100), variant, seed=seed)
        for variant in ("gqa", "kha")
        for seed in (0, 1, 2)
    ]


def test_the_spread_is_twice_the_variance_inside_groups(tmp_path: Path, arms: list[Path]) -> None:
    """Against numpy: three runs of one seed and two of another, apart in the order of their data alone."""
    levels = {0: [2.00, 2.01, 2.05], 1: [1.5, 1.52]}
    paths = [
        made(tmp_path / f"aa{seed}{number}", level, seed=seed, data_seed=number)
        for seed, values in levels.items()
        for number, level in enumerate(values)
    ]
    nulls = {one.kind.rpartition(" ")[2]: one for one in nulls_of(compare_runs(arms), load_runs(paths))}
    found = nulls["data.seed"]
    squares = sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in levels.values())
    assert (found.freedom, len(found.pairs), found.first_step, found.last_step) == (3, 4, 11, 20)
    assert found.spread == pytest.approx(math.sqrt(2 * squares / 3))
    assert found.bound == pytest.approx(3.182 * found.spread)
    assert found.largest == pytest.approx(0.05)
    assert {*nulls} == {"data.seed", "run.seed"} and nulls["run.seed"].freedom == 1


def test_two_functions_that_are_one_up_to_rounding_are_paired_by_seed(tmp_path: Path, arms: list[Path]) -> None:
    paths = [
        made(tmp_path / f"{variant}{seed}", 2.0 + (variant == "frozen") * 1e-6 * (seed + 1), variant, seed=seed)
        for variant in ("plain", "frozen")
        for seed in (0, 1)
    ]
    (found,) = (one for one in nulls_of(compare_runs(arms), load_runs(paths)) if "rounding" in one.kind)
    assert [pair.difference for pair in found.pairs] == pytest.approx([1e-6, 2e-6])
    assert found.freedom == 2 and found.spread == pytest.approx(math.sqrt((1e-12 + 4e-12) / 2))
    assert "plain and frozen are taken to be the same function" in found.caveats


def test_runs_that_are_too_short_or_no_pair_are_refused(tmp_path: Path, arms: list[Path]) -> None:
    comparison = compare_runs(arms)
    for paths, words in (
        ([made(tmp_path / f"short{seed}", 2.0, data_seed=seed, steps=15) for seed in (1, 2)], "has steps 1 to 15"),
        ([made(tmp_path / "a", 2.0, "one"), made(tmp_path / "b", 2.0, "two", seed=1)], "no two of these runs are A/A"),
    ):
        with pytest.raises(ConfigError, match=words):
            nulls_of(comparison, load_runs(paths))


def test_the_command_for_an_a_a_run_repeats_the_reference_on_other_data(arms: list[Path]) -> None:
    typed = command_for_null(load_runs(arms)[0])
    assert typed.startswith("python -m kha_train attention=gqa data.seed=1 run.dir=")
    assert "data.seed=3" not in typed and "run.dir=old" not in typed


def test_the_command_reports_null_seeds_and_effect(
    tmp_path: Path, arms: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    nulls = [made(tmp_path / "null" / f"d{number}", 2.0 + 0.001 * number, data_seed=number) for number in (0, 1)]
    words = ["compare", *map(str, arms), "--null", str(nulls[0].parent), "--effect", "0.02"]

    def answer(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run([*words, "--out", str(tmp_path / "report"), *more])
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = answer("--json")
    told = json.loads(out)["certificate"]
    assert code == 0 and told["nulls"][0]["largest"] == pytest.approx(0.001)
    (need,) = told["seeds_needed"]
    # The spread is 0.01: half of the effect.
    assert need["spread"] == pytest.approx(0.01) and need["needed"] == 5 and need["stated"] is True
    page = (tmp_path / "report" / "report.md").read_text()
    for part in ("Differences that mean nothing", "the stated effect of +0.0200 lies outside", "Seeds needed"):
        assert part in page
    assert "0 of 1 A/A differences are at least as large" in page and "No stretch was recomputed" in page
    assert answer("--effect", "0")[0] == 2
