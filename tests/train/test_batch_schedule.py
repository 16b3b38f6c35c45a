"""A run whose batch grows: its record, its stops, and the runs that it may be gone on as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kha_train.analysis.runs import load_runs
from kha_train.analysis.sameness import confounders, data_proof
from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.reader import find_newest
from kha_train.cli.data import _samples_of_run
from kha_train.config.compose import compose
from kha_train.distributed import World
from kha_train.errors import ResumeError
from kha_train.record import read_metrics, read_run, timing_keys
from kha_train.train.run import train

SMALL = ["engine.name=plain", "data.global_batch_size=2", "engine.micro_batch_size=2", "optim.lr=1e-3", "run.steps=6"]
GROWS = "data.batch_schedule=[{start_step: 3, global_batch_size: 4}, {start_step: 5, global_batch_size: 6}]"
ROWS = [2, 2, 4, 4, 6, 6]


@pytest.fixture(scope="module")
def grown(trained: Callable[..., Path]) -> Path:
    """A run of six steps."""
    return trained(GROWS, "checkpoint.every_steps=2")


def curve(run_dir: Path) -> list[dict]:
    lines, timings = read_metrics(run_dir), timing_keys(read_run(run_dir))
    return [{key: value for key, value in line.items() if key not in (*timings, "attempt")} for line in lines]


def state(run_dir: Path) -> object:
    return find_newest(run_dir, World.single(), print)


def test_samples_tokens_and_speed_of_the_record_follow_the_schedule(grown: Path) -> None:
    lines, ends = read_metrics(grown), [sum(ROWS[: step + 1]) for step in range(6)]
    assert [line["samples_last"] + 1 for line in lines] == ends
    assert [line["samples_last"] - line["samples_first"] + 1 for line in lines] == ROWS
    assert [line["tokens"] for line in lines] == [64 * rows for rows in ends]
    for line, rows in zip(lines, ROWS, strict=True):
        assert line["train/tokens_per_second"] == pytest.approx(64 * rows / line["train/step_seconds"])
    found = [[row["sample"] for row in _samples_of_run(grown, step, -1)["samples"]] for step in range(1, 7)]
    assert found == [list(range(end - rows, end)) for end, rows in zip(ends, ROWS, strict=True)]


@pytest.mark.parametrize("until", [2, 3])
def test_a_stop_at_a_change_or_beside_it_changes_nothing(
    until: int, grown: Path, small: list[str], tmp_path: Path
) -> None:
    config = compose([*small, *SMALL, GROWS, "checkpoint.every_steps=2", f"run.dir={tmp_path}/run"])
    (tmp_path / "run").mkdir()
    assert not train(config, until=until).finished
    assert train(config).finished
    assert curve(tmp_path / "run") == curve(grown)
    assert not compare(state(tmp_path / "run"), state(grown)).tensors


def test_a_grown_batch_trains_like_one_that_was_changed_by_hand(grown: Path, small: list[str], tmp_path: Path) -> None:
    """The outside oracle: runs of one size, each going on with another from the checkpoint of the one before."""
    by_hand = tmp_path / "run"
    by_hand.mkdir()
    settings = [*small, *SMALL, f"run.dir={by_hand}", "checkpoint.every_steps=2"]
    for until, rows in ((2, 2), (4, 4), (6, 6)):
        allowed = [f"data.global_batch_size={rows}", "resume.allow_changes=[data.global_batch_size]"]
        train(compose([*settings, *allowed]), until=until)
    assert curve(by_hand) == curve(grown)
    assert not compare(state(by_hand), state(grown)).tensors
    assert data_proof(*load_runs([grown, by_hand]))[0]


def test_runs_of_different_schedules_are_not_paired(grown: Path, trained: Callable[..., Path]) -> None:
    runs = load_runs([grown, trained()])
    same, why = data_proof(*runs)
    assert not same and why.endswith("read the same shards, but different samples from step 3 on")
    assert any(text.startswith("data.batch_schedule") for text in confounders(*runs))


def test_another_schedule_is_another_run_unless_it_is_allowed(grown: Path, small: list[str], tmp_path: Path) -> None:
    later = "data.batch_schedule=[{start_step: 3, global_batch_size: 4}, {start_step: 8, global_batch_size: 6}]"
    settings = [*small, *SMALL, "run.steps=8", "resume.allow_changes=[run.steps,optim]"]
    with pytest.raises(ResumeError, match=r"data\.batch_schedule") as caught:
        train(compose([*settings, later, f"run.dir={grown}"]))
    assert caught.value.exit_code == 3
    branch = tmp_path / "branch"
    train(compose([*small, *SMALL, "run.steps=8", later, f"run.branch_from={grown}", f"run.dir={branch}"]))
    assert [line["samples_last"] - line["samples_first"] + 1 for line in read_metrics(branch)] == [4, 6]
    assert json.loads((branch / "run.json").read_text())["parent"]["step"] == 6
    assert read_metrics(branch)[-1]["tokens"] == 64 * (sum(ROWS) + 10)
