"""How the time of a run was spent, computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kha_train.record import read_run
from kha_train.record.goodput import Goodput, goodput_of
from kha_train.record.totals import known_totals, totals_of


def line(step: int, attempt: int, time: float, skipped: int = 0) -> dict:
    """A step of 2 s, half a second of it waiting for data, that ended at `time`."""
    return {
        "step": step,
        "attempt": attempt,
        "time": time,
        "train/step_seconds": 2.0,
        "data/wait_seconds": 0.5,
        "train/skipped": skipped,
    }


def goodput(run_dir: Path) -> Goodput | None:
    """From the totals that were kept up, or from the whole record without them."""
    return goodput_of(known_totals(run_dir) or totals_of(run_dir), read_run(run_dir).get("attempts", []))


def write(run_dir: Path, name: str, lines: list[dict]) -> None:
    (run_dir / name).write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_every_second_lies_in_one_bucket(tmp_path) -> None:
    """Two attempts: the first dies unseen at 112 after step 3, the second starts at 130 from step 2."""
    attempts = [
        {"attempt": 1, "started": 100.0, "state": "lost", "ended": 130.0},
        {"attempt": 2, "started": 130.0, "state": "done", "ended": 142.0},
    ]
    (tmp_path / "run.json").write_text(json.dumps({"attempts": attempts}))
    write(tmp_path, "metrics.jsonl", [line(1, 1, 107.0), line(2, 1, 109.0), line(3, 2, 137.0), line(4, 2, 140.0, 1)])
    write(tmp_path, "metrics.discarded.jsonl", [line(3, 1, 112.0)])
    write(tmp_path, "events.jsonl", [{"kind": "checkpoint_saved", "stall_seconds": 0.75}, {"kind": "other"}])
    found = goodput(tmp_path)
    assert found.wall == 42.0
    assert found.productive == 3 * 1.5
    assert (found.skipped, found.lost, found.data_wait, found.checkpoint) == (1.5, 1.5, 2.5, 0.75)
    assert found.starting == 5.0 + 5.0
    assert found.down == 130.0 - 112.0
    assert found.share == pytest.approx(4.5 / 42)
    parts = {name: value for name, value in found.to_dict().items() if name not in ("wall", "goodput")}
    assert sum(parts.values()) == pytest.approx(found.wall)


def test_a_run_without_a_step_has_none(tmp_path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1, "started": 1.0, "state": "failed"}]}))
    assert goodput(tmp_path) is None
