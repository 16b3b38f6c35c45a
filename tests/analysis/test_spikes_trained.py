"""The end of a run rebuilds from its events what the monitor finds in its whole curve."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kha_train.analysis.curve_points import Points
from kha_train.analysis.spikes_trained import found_in_training
from kha_train.record import Record, read_events, read_run
from kha_train.record.columns_twin import read_columns
from kha_train.stability.events import Observation
from kha_train.stability.found import find_events
from kha_train.stability.monitor import Monitor, Verdict

STEPS, SAVED, KILLED = 400, 200, 260
LOSS = (3.0 + 0.02 * np.random.default_rng(0).standard_normal(STEPS)).tolist()
for start in (150, 230, 320):
    LOSS[start : start + 4] = [9.0, 8.0, 6.0, 5.0]


def train(run_dir: Path, steps: int = STEPS) -> tuple[Monitor, Verdict]:
    """A run that saves at step 200, is killed at 260, after an event, and meets the same event again."""
    record, monitor = Record.open(run_dir), Monitor()
    record.begin_attempt(0)
    saved: dict[str, Any] = {}
    verdict = None
    for step in [*range(1, KILLED + 1), *range(SAVED + 1, steps + 1)]:
        if step <= record.last_step:
            record.close("stopped")
            record = Record.open(run_dir)
            record.begin_attempt(SAVED)
            monitor = Monitor.restore(json.loads(json.dumps(saved)))
        verdict = monitor.update(Observation(step, LOSS[step - 1], 1.0, 128 * step, 1e-3, 2 * step, 2 * step + 1))
        line = {"step": step, "train/loss": LOSS[step - 1], "train/grad_norm": 1.0, "train/lr": 1e-3}
        record.step({**line, "tokens": 128 * step, "samples_first": 2 * step, "samples_last": 2 * step + 1})
        if verdict.closed:
            record.event("spike_closed", step, **verdict.closed.to_dict())
        if verdict.diverged:
            record.event("divergence", step)
        if step == SAVED:
            saved = monitor.state()
    record.close("done")
    assert verdict is not None
    return monitor, verdict


@pytest.mark.slow
@pytest.mark.parametrize("steps", [STEPS, 321])
def test_the_events_of_a_run_that_was_killed_are_those_of_its_curve(tmp_path: Path, steps: int) -> None:
    monitor, verdict = train(tmp_path, steps)
    columns, events = read_columns(tmp_path), read_events(tmp_path)
    assert [event["kind"] for event in events].count("spike_closed") == 3 + (steps == STEPS)
    found = found_in_training(read_run(tmp_path), columns, events, monitor, verdict)
    again = find_events(Points(columns), frozenset())
    assert found is not None and len(again.events) == 3
    assert [asdict(event) for event in found.events] == [asdict(event) for event in again.events]
    assert found.events[-1].open == (steps == 321)
    assert (found.diverged_at, found.metrics) == (again.diverged_at, again.metrics)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run, events: events.append({"kind": "rewind", "step": 9, "attempt": 1}),
        lambda run, events: events.append({"kind": "lines_missing", "step": 9, "attempt": 1}),
        lambda run, events: run.update(parent={"run_id": "a", "step": 0}),
        lambda run, events: run["provenance"].pop("detector"),
        lambda run, events: run["provenance"].update(detector=0),
        lambda run, events: run["attempts"][1].update(changed={"detector": 2}),
        lambda run, events: events.remove(next(one for one in events if one["kind"] == "spike_closed")),
        lambda run, events: [one.pop("height", 0) for one in events],
    ],
)
def test_a_run_that_went_back_or_whose_events_do_not_fit_is_judged_again(
    tmp_path: Path, spoil: Callable[[dict[str, Any], list[dict[str, Any]]], Any]
) -> None:
    monitor, verdict = train(tmp_path)
    columns, events, run = read_columns(tmp_path), read_events(tmp_path), read_run(tmp_path)
    spoil(run, events)
    assert found_in_training(run, columns, events, monitor, verdict) is None
