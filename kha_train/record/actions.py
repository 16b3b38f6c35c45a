"""Counts the interventions in a run, such as skipped updates and rewinds, from its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kha_train.record.reader import read_discarded, read_events

ACTIONS = ("step_discarded", "rewind", "rewind_impossible", "divergence", "abort", "zclip")
UNDONE = "rewind "
"""The reason that a rewind gives for discarded lines begins with this; other reasons come from a restart."""


def count_actions(run_dir: Path | None, actions: Sequence[str] = ACTIONS) -> dict[str, int]:
    """How often each of `actions` happened in the run; zeros for None. Raises DataError when the record is damaged.

    The record of events only grows. Actions in steps that a restart undid do not count, and an action repeated in the
    same step, over the same samples, counts once.
    """
    if run_dir is None:
        return dict.fromkeys(actions, 0)
    events = [event for event in read_events(run_dir) if event["kind"] in actions]
    lost = {
        (line["attempt"], line["step"], line["samples_first"])
        for line in (read_discarded(run_dir) if events else ())
        if "samples_first" in line and not line["discarded_reason"].startswith(UNDONE)
    }
    done = {
        (event["kind"], event["step"], event.get("samples_first"), str(event.get("window")))
        for event in events
        if (event["attempt"], event["step"], event.get("samples_first")) not in lost
    }
    kinds = [kind for kind, *_ in done]
    return {kind: kinds.count(kind) for kind in actions}


def skip_windows(events: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Sample numbers [first, last) that rewinds left out, those of the run that a branch continues included."""
    found: list[tuple[int, int]] = []
    for event in events:
        windows = [event["window"]] if event["kind"] == "rewind" and "window" in event else []
        windows += event.get("skip_windows", []) if event["kind"] == "branched" else []
        found += [(first, last) for first, last in windows]
    return found
