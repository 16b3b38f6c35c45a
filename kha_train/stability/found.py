"""Runs the training monitor over a whole curve, and over the lines that rewinds undid."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import NamedTuple

from .events import Observation, SpikeEvent
from .monitor import Monitor

SCORES = "spike/olmo"
SCORE_NAMES = tuple(f"{SCORES}_{name}" for name in (
    "loss_score", "loss_score_w10k", "loss_up_score", "gnorm_score", "gnorm_score_w10k",
))  # fmt: skip


class Found(NamedTuple):
    """What the monitor found in a curve: its `events`, including one still open at its end, the steps at which the
    divergence guard fired, the metrics of the last step, whether it could judge any step, and copies of the monitor
    `kept` before some steps.
    """

    events: list[SpikeEvent]
    diverged_at: list[int]
    metrics: dict[str, float | None]
    judged: bool = False
    kept: Mapping[int, Monitor] = MappingProxyType({})


def find_events(
    points: Sequence[Observation],
    planned: frozenset[int],
    keep_at: Collection[int] = (),
    monitor: Monitor | None = None,
) -> Found:
    """What the monitor finds in `points`; see `Found`. `monitor` has already seen the points before them; their events
    are not reported unless still open. A copy is kept before each of the steps `keep_at`.
    """
    monitor, judged, last = monitor or Monitor(), False, len(points) - 1
    events: list[SpikeEvent] = []
    diverged_at: list[int] = []
    metrics: dict[str, float | None] = {}
    kept: dict[int, Monitor] = {}
    waiting = sorted(keep_at, reverse=True)
    for number, point in enumerate(points):
        while waiting and waiting[-1] <= point.step:
            kept[waiting.pop()] = deepcopy(monitor)
        verdict = monitor.update(point, point.step in planned, with_metrics=number == last)
        judged = judged or verdict.judged
        metrics = {**verdict.metrics}
        if verdict.closed:
            events.append(verdict.closed)
        if verdict.diverged:
            diverged_at.append(point.step)
    events += [monitor.events.event] if monitor.events.event else []
    kept |= {step: deepcopy(monitor) for step in waiting}
    return Found(events, diverged_at, metrics | dict.fromkeys(not_judged(monitor)), judged, kept)


def not_judged(monitor: Monitor) -> list[str]:
    """The scores whose window was never full: for these, 0 % would be no result."""
    signals = {"loss": monitor.loss, "gnorm": monitor.grad_norm}
    shares = {f"{SCORES}_{name}_": signal.both_sides.judged for name, signal in signals.items()}
    return [key for key in SCORE_NAMES if not shares[next(head for head in shares if key.startswith(head))]]


def rewound_events(
    undone: Sequence[list[Observation]],
    survived: set[tuple[int, int]],
    planned: frozenset[int],
    kept: Mapping[int, Monitor],
) -> Found:
    """Events that began in the lines `undone` by rewinds and did not recur when the step was replayed, and the steps of
    these lines at which the divergence guard fired.

    Each rewind is judged on the curve as it was then: the lines that survived it up to its target, then those it undid.
    `kept` holds the monitor before all of these lines. A rewind that was repeated, because the run was killed after it,
    counts once.
    """
    points: list[Observation] = []
    events: dict[tuple[int, int], SpikeEvent] = {}
    diverged_at: list[int] = []
    lowest = math.inf
    for group in reversed(undone):
        start = group[0].step
        lowest = min(lowest, start)
        points = [point for point in points if point.step < start] + group
        found = find_events(points, planned, monitor=deepcopy(kept[int(lowest)]))
        diverged_at += [step for step in found.diverged_at if step >= start]
        events |= {
            place: event
            for event in found.events
            if event.start_step >= start and (place := (event.start_step, event.samples_first)) not in survived
        }
    for event in events.values():
        event.open = False
    return Found(sorted(events.values(), key=lambda event: event.start_step), diverged_at, {})
