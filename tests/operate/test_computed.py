"""Studies whose trials are computations: figures whose right values are known, and what a stop leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from kha_train.analysis.computation import Computation
from kha_train.analysis.studies import load_study
from kha_train.cli.main import run
from kha_train.errors import ConfigError, DataError
from kha_train.operate import computed
from kha_train.operate.slurm import JobOptions
from kha_train.operate.study import StudyPlan, finished_runs, plan_study, run_here, submit_study, write_results
from kha_train.operate.study_costs import study_costs

TEXT = """
question: Where is the least?
source: a test
trials: parabola
reference: low
arms:
  - {name: low, overrides: [height=1.0]}
  - {name: high, overrides: [height=2.0]}
measures: [{kind: entry, entry: distance}]
published:
  - {what: a book, arm: low, better_than: high}
  - {what: a book, arm: low, value: 1.5}
cpu: {steps: 2, rates: [1.0, 2.0, 4.0], seeds: [0, 1, 2], rate_seeds: [7], overrides: [width=1.0]}
paper: {steps: 2, rates: [2.0], seeds: [0]}
"""
MEASURED: list[Computation] = []


@dataclass(frozen=True, kw_only=True)
class Parabola(Computation):
    """(rate - 2)^2 / width + height + seed / 10; a rate of 4 diverges."""

    figures: ClassVar[tuple[str, ...]] = ("distance",)
    interrupted_after: ClassVar[int] = -1
    height: float
    width: float = 1.0

    def invalid(self) -> ConfigError | None:
        return ConfigError("is flat", field="width", value=self.width) if self.width == 0 else None

    def measure(self) -> Mapping[str, float]:
        if len(MEASURED) == self.interrupted_after:
            raise KeyboardInterrupt
        MEASURED.append(self)
        distance = (self.rate - 2) ** 2 / self.width + self.height + self.seed / 10
        return {"distance": math.inf if self.rate == 4 else distance}

    def flops(self) -> float:
        return 10.0 * self.steps

    def memory(self) -> int:
        return 2**30

    def seconds_a_step(self) -> float:
        return 3.0


@pytest.fixture(autouse=True)
def parabolas(monkeypatch: pytest.MonkeyPatch) -> None:
    MEASURED.clear()
    monkeypatch.setattr(computed, "COMPUTATIONS", {"parabola": Parabola})


def planned(folder: Path, *given: str, text: str = TEXT, scale: str = "cpu") -> StudyPlan:
    (folder / "mine.yaml").write_text(text)
    return plan_study(load_study(str(folder / "mine.yaml"), scale), folder / "studies" / "mine", given)


def done(plan: StudyPlan) -> computed.Outcome:
    return run_here(plan, processes=1, parallel=1, retry_failed=False, watch=lambda progress: None)


def test_the_best_rate_is_chosen_and_arms_are_compared_at_it(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    result = done(plan)
    assert {name: arm.chosen.rate for name, arm in result.arms.items() if arm.chosen} == {"low": 2.0, "high": 2.0}
    assert [one.rate for one in MEASURED] == [1, 2, 4, 1, 2, 4, *[2] * 6]
    assert result.arms["low"].diverged_by_rate == {1.0: 0, 2.0: 0, 4.0: 1}
    # Of low: 1.0, 1.1, 1.2; the difference is 1 on every seed.
    assert result.arms["low"].mean("distance") == pytest.approx(1.1)
    (found,) = result.compared
    assert found.interval is not None and [found.interval.low, found.interval.high] == pytest.approx([1.0, 1.0])
    written = write_results(plan, result)
    assert [path.name for path in written] == ["result.json", "result.md"]
    answer = json.loads(written[0].read_text())
    assert answer["command"] == "kha study run mine --local" and answer["trials"] == 12
    assert 0 < answer["began"] <= answer["ended"] and answer["seconds"] >= 0 and answer["commits"] != [None]
    relation, value = answer["published"]
    assert relation["ours"].startswith("low - high, distance: -1 [-1, -1] over 3 seeds")
    # Student: 1.1 +- 4.303 x 0.1 / sqrt(3) = 0.2484.
    assert value["ours"] == "distance 1.1 [0.8516, 1.348]"
    assert "| a book | low | better than high | low - high, distance: -1" in written[1].read_text()


def test_a_study_goes_on_after_an_interrupt_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Parabola, "interrupted_after", 7)
        done(plan)
    before = list(MEASURED)
    assert len(before) == 7 and len(finished_runs(plan)) == 7
    MEASURED.clear()
    done(plan)
    assert len(MEASURED) == 5 and not {*MEASURED} & {*before}
    MEASURED.clear()
    done(planned(tmp_path))
    assert MEASURED == []


def test_trials_of_other_settings_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path, scale="paper")
    done(plan)
    with pytest.raises(ConfigError, match=r"another trial \(width=2.0\)"):
        finished_runs(planned(tmp_path, "width=2.0", scale="paper"))
    file = next(plan.directory.glob("*/figures.json"))
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DataError, match="damaged"):
        finished_runs(plan)


@pytest.mark.parametrize(
    ("given", "text", "word"),
    [
        ("width=0.0", TEXT, "is flat"),
        ("widht=1.0", TEXT, "unknown key"),
        ("rate=1.0", TEXT, "is set by the study"),
        ("height=1.0", TEXT.replace("parabola", "parabel"), "no such trials"),
        ("height=1.0", TEXT.replace("entry: distance", "entry: distanz"), "no such figure"),
    ],
)
def test_settings_are_checked_before_anything_is_computed(tmp_path: Path, given: str, text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        planned(tmp_path, given, text=text)
    assert MEASURED == []


def test_slurm_is_refused_and_the_cost_is_the_time_of_the_steps(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    with pytest.raises(ConfigError, match="not on SLURM"):
        submit_study(plan, JobOptions(), retry_failed=False)
    costs = study_costs(plan, {})
    assert costs.seconds() == 12 * 2 * 3.0 and costs.cost() is None and "timed now" in costs.basis
    assert [(fit.memory_gib, fit.fits, fit.needs) for fit in costs.fits] == [(1.0, None, "")] * 2


def test_the_commands_take_a_study_of_computations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tmp_path)
    said = []
    for command in ("show", "run", "report"):
        local = ["--local"] if command == "run" else []
        with pytest.raises(SystemExit) as ended:
            run(["study", command, str(tmp_path / "mine.yaml"), f"--dir={tmp_path / 'studies'}", *local])
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    assert "in all: 12 runs" in said[0] and "high - low, distance: +1 [+1, +1] over 3 seeds" in said[1]
    assert said[2] == said[1]
