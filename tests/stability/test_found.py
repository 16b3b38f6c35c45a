"""The events of a curve are those that the monitor finds step by step, and a rewind is judged on the curve at that
time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.stability.events import Observation
from kha_train.stability.found import find_events, rewound_events
from kha_train.stability.monitor import Monitor

LOSSES = st.floats(1.0, 1.1) | st.sampled_from([5.0, 1e30, math.nan, math.inf])


def curve(draw: st.DrawFn, first: int, count: int, samples: int) -> list[Observation]:
    """Steps from `first` on, calm except for a few."""
    odd = draw(st.dictionaries(st.integers(0, count - 1), LOSSES, max_size=6))
    losses = [odd.get(place, 1.0 + 0.01 * math.sin(7.0 * (first + place))) for place in range(count)]
    return [
        Observation(first + place, loss, 1.0 + 0.1 * math.cos(first + place), samples_first=samples + first + place)
        for place, loss in enumerate(losses)
    ]


@st.composite
def rewinds(draw: st.DrawFn) -> tuple[list[Observation], list[list[Observation]]]:
    """A curve and the lines that its rewinds undid, in the order of the rewinds."""
    points = curve(draw, 1, draw(st.integers(70, 300)), 0)
    starts = draw(st.lists(st.integers(1, len(points) + 5), max_size=4))
    return points, [curve(draw, start, draw(st.integers(1, 40)), 1000 * n) for n, start in enumerate(starts, 1)]


def plainly(points: Sequence[Observation], planned: frozenset[int]) -> tuple[list[str], list[int]]:
    """Events and divergences found by one monitor over the whole curve, with the metrics of every step."""
    monitor, events, diverged_at = Monitor(), [], []
    for point in points:
        verdict = monitor.update(point, planned_change=point.step in planned)
        events += [verdict.closed] if verdict.closed else []
        diverged_at += [point.step] if verdict.diverged else []
        assert verdict.judged == ("spike/z" in verdict.metrics)
    return [*events, *([monitor.events.event] if monitor.events.event else [])], diverged_at


@settings(deadline=None)
@given(rewinds(), st.frozensets(st.integers(60, 200), max_size=2))
def test_a_rewind_is_judged_as_if_the_whole_curve_were_seen_again(
    made: tuple[list[Observation], list[list[Observation]]], planned: frozenset[int]
) -> None:
    points, undone = made
    survived = {(point.step, point.samples_first) for point in points}
    found = find_events(points, planned, keep_at={group[0].step for group in undone})
    rewound = rewound_events(undone, survived, planned, found.kept)
    expected, diverged_at = plainly(points, planned)
    assert repr(found.events) == repr(expected) and found.diverged_at == diverged_at
    expected, diverged_at, stood = {}, [], list(points)
    for group in reversed(undone):
        stood = [point for point in stood if point.step < group[0].step] + group
        events, diverged = plainly(stood, planned)
        diverged_at += [step for step in diverged if step >= group[0].step]
        for event in events:
            place = (event.start_step, event.samples_first)
            if event.start_step >= group[0].step and place not in survived:
                event.open = False
                expected[place] = event
    assert repr(rewound.events) == repr(sorted(expected.values(), key=lambda event: event.start_step))
    assert rewound.diverged_at == diverged_at
