"""What the monitor found while a run trained: its events were recorded, so its end need not judge the curve again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from kha_train.analysis.spikes_found import Found, not_judged
from kha_train.record.columns import Columns
from kha_train.stability.events import SpikeEvent
from kha_train.stability.monitor import DETECTOR, Monitor, Verdict

_GOES_BACK = ("rewind", "lines_missing")
"""Events after which the curve is not what the monitor saw, one step after the other."""


def found_in_training(
    run: Mapping[str, Any], columns: Columns, events: Sequence[Mapping[str, Any]], monitor: Monitor, verdict: Verdict
) -> Found | None:
    """What `find_events` would find in the curve `columns`, from the recorded `events` that a restart did not undo;
    `monitor` and `verdict` are those of its last step, `run` is run.json.

    None where it has to be found again: the run went back, was begun with other detectors, is too short to be judged,
    or its events are not those that the monitor has counted.
    """
    begun_with = run.get("provenance", {}).get("detector")
    changed = any("detector" in attempt["changed"] for attempt in run.get("attempts", []))
    if begun_with != DETECTOR or changed or not verdict.judged or any(one["kind"] in _GOES_BACK for one in events):
        return None
    kept = [event for event in events if event["kind"] in ("spike_closed", "divergence") and _stands(event, columns)]
    names = [field.name for field in fields(SpikeEvent)]
    try:
        closed = [SpikeEvent(**{key: one[key] for key in names}) for one in kept if one["kind"] == "spike_closed"]
    except KeyError:
        return None
    kinds = [event.kind for event in closed]
    if any(kinds.count(kind) != count for kind, count in monitor.closed.items()):
        return None
    is_open = [monitor.events.event] if monitor.events.event else []
    diverged_at = [event["step"] for event in kept if event["kind"] == "divergence"]
    metrics = verdict.metrics | dict.fromkeys(not_judged(monitor))
    return Found([*closed, *is_open], diverged_at, metrics, judged=True)


def _stands(event: Mapping[str, Any], columns: Columns) -> bool:
    """Whether the line of the step in which it happened survives, made by the same attempt."""
    place = int(np.searchsorted(columns["step"], event["step"]))
    return place < len(columns) and (columns["step"][place], columns["attempt"][place]) == (
        event["step"],
        event["attempt"],
    )
