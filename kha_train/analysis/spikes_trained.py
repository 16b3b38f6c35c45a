"""Takes the monitor's findings from the recorded events of a run, so that the end of a run need not judge the curve
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from kha_train.record.columns import Columns
from kha_train.stability.events import SpikeEvent
from kha_train.stability.found import Found, not_judged
from kha_train.stability.monitor import DETECTOR, Monitor, Verdict

_GOES_BACK = ("rewind", "lines_missing")
"""Events after which the curve is no longer the sequence of steps that the monitor saw."""


def found_in_training(
    run: Mapping[str, Any], columns: Columns, events: Sequence[Mapping[str, Any]], monitor: Monitor, verdict: Verdict
) -> Found | None:
    """The result of `find_events` for the curve `columns`, rebuilt from the recorded `events` that no restart undid.
    `monitor` and `verdict` are those of its last step, `run` is run.json.

    None where `find_events` must be run: after a rewind, with other detectors at the start, for a curve too short to be
    judged, for a branch, whose monitor has judged its parent too, or when the events do not match the monitor's counts.
    """
    if run.get("parent"):
        return None
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
    """Whether the line of the event's step survives and was made by the same attempt."""
    place = int(np.searchsorted(columns["step"], event["step"]))
    return place < len(columns) and (columns["step"][place], columns["attempt"][place]) == (
        event["step"],
        event["attempt"],
    )
