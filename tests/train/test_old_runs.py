"""Runs of an older release (tests/fixtures/old_runs) resume, compare and are scored."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.spikes import read_curve, score_curve
from kha_train.checkpoint.inventory import inventory
from kha_train.config.compose import compose
from kha_train.errors import ResumeError
from kha_train.record import read_events, read_metrics, read_run
from kha_train.train.run import train

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs"
VARIANTS = {"gqa": ["attention=gqa"], "kha_mlp": ["attention=kha_mlp", "engine=zero3"]}
STOPPED, STEPS = 72, 80
EQUAL = ("step", "samples_first", "samples_last")


@pytest.fixture
def old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old runs, and the working directory from which their paths hold."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def _overrides(run: str) -> list[str]:
    """The overrides that the old run was started with."""
    command = read_run(OLD / "runs" / run)["provenance"]["command"].split()
    return [word for word in command if "=" in word]


@pytest.mark.parametrize("run", sorted(VARIANTS))
def test_an_old_run_resumes_as_its_own_release_continued_it(old_runs: Path, run: str) -> None:
    overrides = _overrides(run)
    assert set(VARIANTS[run]) <= set(overrides)
    outcome = train(compose(overrides))
    assert outcome.finished and outcome.step == STEPS

    lines = read_metrics(old_runs / run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    expected = json.loads((OLD / "continued.json").read_text())[run]
    for line, before in zip(lines[STOPPED:], expected, strict=True):
        assert {key: line[key] for key in EQUAL} == {key: before[key] for key in EQUAL}
        # Other processors round in other places.
        assert {key: line[key] for key in before} == pytest.approx(before, rel=1e-4)
    kinds = [event["kind"] for event in read_events(old_runs / run)]
    assert "lines_discarded" not in kinds and kinds[-1] == "attempt_ended"


def test_a_branch_of_an_old_run_continues_as_its_own_release_continued_it(old_runs: Path) -> None:
    overrides = [*_overrides("gqa"), "run.dir=runs/branch", "run.branch_from=runs/gqa"]
    assert train(compose(overrides)).step == STEPS
    lines = read_metrics(old_runs / "branch")
    assert [line["step"] for line in lines] == list(range(STOPPED + 1, STEPS + 1))
    for line, before in zip(lines, json.loads((OLD / "continued.json").read_text())["gqa"], strict=True):
        assert {key: line[key] for key in EQUAL} == {key: before[key] for key in EQUAL}
        assert {key: line[key] for key in before} == pytest.approx(before, rel=1e-4)
    assert read_run(old_runs / "branch")["parent"]["run_id"] == read_run(old_runs / "gqa")["run_id"]


def test_a_setting_changed_on_an_old_run_is_still_refused(old_runs: Path) -> None:
    with pytest.raises(ResumeError, match=r"optim\.lr +0\.003 -> 0\.001\n "):
        train(compose([*_overrides("gqa"), "optim.lr=0.001"]))


def test_old_runs_compare_as_one_pair_of_the_same_data(old_runs: Path) -> None:
    comparison = compare_runs([old_runs / "gqa", old_runs / "kha_mlp"])
    (pair,) = comparison.pairs
    assert pair.same_seed and pair.difference is not None
    losses = [{line["step"]: line["train/loss"] for line in read_metrics(old_runs / run)} for run in ("gqa", "kha_mlp")]
    late = [losses[1][step] - losses[0][step] for step in range(pair.first_step, pair.last_step + 1)]
    assert pair.difference.mean == pytest.approx(math.fsum(late) / len(late))
    assert pair.last_step == STOPPED


@pytest.mark.parametrize("run", sorted(VARIANTS))
def test_an_old_run_is_scored_and_its_checkpoint_listed(old_runs: Path, run: str) -> None:
    report = score_curve(read_curve(old_runs / run))
    assert [point.step for point in report.curve.points] == list(range(1, STOPPED + 1))
    assert not report.events and report.summary["steps"] == STOPPED
    (row,) = inventory(old_runs / run / "checkpoints")
    assert (row.step, row.state) == (STOPPED, "sizes match")
