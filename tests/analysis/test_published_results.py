"""Published intervals, computed again by a script that shares no code with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.analysis.recompute_study import from_records, recomputed

RESULTS = sorted((Path(__file__).resolve().parents[2] / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=[file.stem for file in RESULTS])
def test_every_interval_of_a_published_result_is_computed_again(file: Path) -> None:
    result = json.loads(file.read_text())
    ours, intervals = recomputed(result), 0
    told = {(one["arm"], one["measure"]): one for one in result["comparisons"]}
    told |= {(f"{one['arm']} - {one['reference']}", one["measure"]): one for one in result.get("gains", [])}
    assert told.keys() == ours.keys()
    for key, one in told.items():
        again = ours[key]
        printed = {seed: float(value) for seed, value in one["differences"].items()}
        assert again["differences"] == pytest.approx(printed, abs=1e-12)
        assert again["sign_test"] == (None if one["sign_test"] is None else pytest.approx(one["sign_test"], abs=1e-12))
        if one["interval"]:
            intervals += 1
            printed_mean, (mean, low, high) = one["interval"]["mean"], again["interval"]
            assert mean == pytest.approx(printed_mean, abs=1e-12)
            # The package has Student's quantile with four digits.
            half = (one["interval"]["high"] - one["interval"]["low"]) / 2
            assert [printed_mean - low, high - printed_mean] == pytest.approx([half, half], rel=3e-4, abs=1e-12)
        else:
            assert again["interval"] is None or one["no_interval"] in ("they are counts", "areas of events are skewed")
    assert intervals, "a result without any interval says little"


def test_three_results_or_more_are_checked() -> None:
    assert len(RESULTS) >= 3


def test_figures_of_runs_are_computed_again_from_their_records(tmp_path: Path) -> None:
    curve = [4.0] * 10 + [2.0] * 90
    (tmp_path / "run").mkdir()
    lines = [{"step": step, "tokens": step, "train/loss": loss, "train/step_seconds": 1.0}
             for step, loss in enumerate(curve, 1)]  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"provenance": {"parameters": {"total": 1}}}))
    values = {"steps_to_2.3": {"0": 15.0}, "train_loss": {"0": 2.0}}
    result = {
        "measures": [{"name": "steps_to_2.3", "kind": "steps_to", "threshold": 2.3},
                     {"name": "train_loss", "kind": "train_loss"}],
        "arms": {"gqa": {"seeds": [0], "runs": ["elsewhere/run"], "values": values}},
    }  # fmt: skip
    assert from_records(result, tmp_path) == {("gqa", "steps_to_2.3", "0"): 15.0, ("gqa", "train_loss", "0"): 2.0}
