"""Statistics of a run's events: number, rate and size, and which events several runs share.

No paper defines these: the KHA paper names stability as its second claim and gives no metric for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .events import CLASSES, SpikeEvent

SPIKES = ("narrow", "wide")
"""The classes that count as spikes. Other events are level shifts or divergences, or have not ended."""
BILLION = 1e9
NEIGHBOURHOOD = 2
"""Events of two runs match when they are at most this many steps apart, or the samples of this many steps."""


@cache
def poisson_interval(count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (Garwood) interval of a Poisson mean, given `count` observed events."""
    return _exact_interval(count, confidence, _poisson_cdf)


@cache
def dispersed_interval(count: int, runs: float, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of the expected events of `runs` runs together, whose rates are exponentially distributed (a
    variation of 100 %), given `count` observed events: they are negative binomial with `runs` as their shape.
    """
    return _exact_interval(count, confidence, lambda seen, mean: _dispersed_cdf(seen, mean, runs))


def rate(count: int, exposure: float) -> dict[str, float]:
    """`count` per unit of `exposure` with its 95 % Poisson interval; all nan without exposure.

    The limits are rounded to 9 digits: logarithms differ in their last bits from library to library.
    """
    if exposure <= 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    low, high = (float(f"{limit / exposure:.9g}") for limit in poisson_interval(count))
    return {"value": count / exposure, "low": low, "high": high}


def reported_rate(count: int, exposure: float) -> dict[str, float | None]:
    """As `rate`, for reports: None without exposure."""
    return {name: None if math.isnan(value) else value for name, value in rate(count, exposure).items()}


def summarise(
    events: Sequence[SpikeEvent],
    *,
    first_step: int,
    last_step: int,
    tokens: int,
    undone_steps: Sequence[int] = (),
    diverged: bool = False,
) -> dict[str, Any]:
    """Counts, sizes and rates of a run's `events` over the steps `first_step` .. `last_step`.

    `tokens` counts the tokens of these steps alone (0: unknown). If `events` includes events that a rewind undid,
    `undone_steps` is the number of undone steps; they are added to the exposure, with as many tokens each. `spikes` and
    their rates cover narrow and wide events. `area_total`, `max_height` and `steps_in_spike_frac` are over events of
    every class, so they also describe a run that never recovers. `diverged` is true when an event is open at the end,
    or when the caller sets it. The halves are halves of `first_step` .. `last_step`.
    """
    surviving = last_step - first_step + 1
    steps = surviving + len(undone_steps)
    tokens = round(tokens * steps / surviving)
    by_class = {kind: _sizes([event for event in events if event.kind == kind]) for kind in CLASSES}
    spikes = [event for event in events if event.kind in SPIKES]
    middle = first_step + surviving / 2
    first_half = sum(event.start_step < middle for event in spikes)
    first_half_steps = surviving / 2 + sum(step < middle for step in undone_steps)
    total = _sizes(events)
    return {
        "steps": steps,
        "tokens": tokens,
        "events_total": len(events),
        "spikes": len(spikes),
        "diverged": diverged or any(event.open for event in events),
        **{f"{kind}_total": sizes["events"] for kind, sizes in by_class.items()},
        "nonfinite_steps": sum(event.nonfinite_steps for event in events),
        "first_half": first_half,
        "second_half": len(spikes) - first_half,
        "steps_in_spike_frac": total["steps"] / max(steps, 1),
        "area_total": total["area"],
        "max_height": total["max_height"],
        "by_class": by_class,
        "rates": {
            "per_1k_steps": reported_rate(len(spikes), steps / 1000),
            "per_billion_tokens": reported_rate(len(spikes), tokens / BILLION),
            "wide_per_1k_steps": reported_rate(by_class["wide"]["events"], steps / 1000),
            "first_half_per_1k_steps": reported_rate(first_half, first_half_steps / 1000),
            "second_half_per_1k_steps": reported_rate(len(spikes) - first_half, (steps - first_half_steps) / 1000),
        },
    }


def _sizes(events: Sequence[SpikeEvent]) -> dict[str, Any]:
    """The number of `events`, the steps inside them, the sum of their areas and their largest height."""
    return {
        "events": len(events),
        "steps": sum(event.width for event in events),
        "area": math.fsum(event.area for event in events),
        "max_height": max((event.height for event in events), default=0.0),
    }


def shared_events(runs: Sequence[Sequence[SpikeEvent]]) -> list[list[bool]]:
    """For every event of every run, whether another run has one at the same place.

    The place is given by sample numbers where both runs know them: runs over the same data in the same order that spike
    there were hit by the same data, at whatever step. Otherwise it is given by the step, which proves less.
    """
    return [
        [any(_touch(event, other) for i, others in enumerate(runs) if i != number for other in others) for event in run]
        for number, run in enumerate(runs)
    ]


def tail_gap(curve: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]) -> dict[str, float | int]:
    """Mean of loss - reference loss at equal tokens, over the last half of the tokens that both have seen. A curve
    begins as far before its first point as that is before the second.

    Points are (tokens, loss) with strictly increasing tokens (or steps in their place); the reference is interpolated
    linearly. Non-finite losses are left out. `points` is the number of points used; the gap is nan when there are none.
    """
    curve = [point for point in curve if math.isfinite(point[1])]
    reference = [point for point in reference if math.isfinite(point[1])]
    if not curve or not reference:
        return {"gap": math.nan, "points": 0}
    end = min(curve[-1][0], reference[-1][0])
    middle = (max(_begin(curve), _begin(reference)) + end) / 2
    differences = []
    place = 0
    for tokens, loss in curve:
        if not (max(middle, reference[0][0]) <= tokens <= end):
            continue
        while place + 1 < len(reference) and reference[place + 1][0] <= tokens:
            place += 1
        differences.append(loss - _interpolated(reference, place, tokens))
    return {"gap": math.fsum(differences) / len(differences) if differences else math.nan, "points": len(differences)}


def _begin(points: Sequence[tuple[float, float]]) -> float:
    return max(2 * points[0][0] - points[1][0], 0.0) if len(points) > 1 else 0.0


def _interpolated(points: Sequence[tuple[float, float]], place: int, tokens: float) -> float:
    left, value = points[place]
    if left == tokens or place + 1 == len(points):
        return value
    right, next_value = points[place + 1]
    return value + (next_value - value) * (tokens - left) / (right - left)


def _touch(one: SpikeEvent, other: SpikeEvent) -> bool:
    if one.samples_first >= 0 and other.samples_first >= 0:
        near = NEIGHBOURHOOD * max(_batch(one), _batch(other))
        return one.samples_first <= other.samples_last + near and other.samples_first <= one.samples_last + near
    return one.start_step <= other.end_step + NEIGHBOURHOOD and other.start_step <= one.end_step + NEIGHBOURHOOD


def _batch(event: SpikeEvent) -> float:
    """Number of samples of a step."""
    return (event.samples_last - event.samples_first + 1) / event.width


def _exact_interval(count: int, confidence: float, cdf: Callable[[int, float], float]) -> tuple[float, float]:
    """The means for which `count` is at the edge of either tail; `cdf` gives P(N <= count) for a mean."""
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else _solve(lambda mean: 1 - cdf(count - 1, mean) - tail)
    return low, _solve(lambda mean: tail - cdf(count, mean))


def _poisson_cdf(count: int, mean: float) -> float:
    """P(N <= count). The terms are logarithms, so that large means do not underflow before the sum."""
    if mean <= 0:
        return 1.0
    return math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count + 1))


def _dispersed_cdf(count: int, mean: float, shape: float) -> float:
    """P(N <= count) of a negative binomial distribution."""
    if mean <= 0:
        return 1.0
    never, more = shape * math.log(shape / (shape + mean)), math.log(mean / (shape + mean))
    logs = (math.lgamma(k + shape) - math.lgamma(shape) - math.lgamma(k + 1) + k * more for k in range(count + 1))
    return math.fsum(math.exp(never + one) for one in logs)


def _solve(rising: Callable[[float], float]) -> float:
    """The positive root of an increasing function, by bisection."""
    low, high = 0.0, 1.0
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
