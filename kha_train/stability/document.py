"""The score of a curve as a document: what docs/spike_score.md defines."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .events import Observation, SpikeEvent
from .found import SCORES, find_events
from .statistics import summarise

SPECIFICATION = "1.0"
"""The version of docs/spike_score.md that this package implements."""


def distinct_steps(rows: Iterable[Observation]) -> tuple[tuple[Observation, ...], int]:
    """The rows by rising step, of several with one step the last, and the number of rows left out."""
    rows = list(rows)
    by_step = {row.step: row for row in rows}
    return tuple(by_step[step] for step in sorted(by_step)), len(rows) - len(by_step)


def tokens_between(first: Observation, last: Observation) -> int:
    """Tokens of the steps from `first` to `last`, of a curve whose tokens rise with every row.

    The first step is counted as an average one.
    """
    if last.step == first.step:
        return last.tokens
    between = last.step - first.step
    return round((last.tokens - first.tokens) * (between + 1) / between)


def scores_of(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The published percentages among the metrics of the last step; None where the curve was too short."""
    return {name: value for name, value in metrics.items() if name.startswith(SCORES)}


def known_only(summary: dict[str, Any], judged: bool) -> dict[str, Any]:
    """`summary`, without rates and shares when nothing was `judged`: 0 would be a statement."""
    if judged:
        return summary
    unknown = {name: dict.fromkeys(rate) for name, rate in summary["rates"].items()}
    return {**summary, "steps_in_spike_frac": None, "rates": unknown}


def document(rows: Sequence[Observation], planned: Collection[int] = ()) -> dict[str, Any]:
    """The document of a curve of at least one row. `planned` are steps with an intended change of the loss."""
    points, repeated = distinct_steps(rows)
    first, last = points[0], points[-1]
    rising = all(one.tokens < two.tokens for one, two in pairwise(points))
    known = rising if len(points) > 1 else first.step == 1 and first.tokens > 0
    found = find_events(points, frozenset(planned))
    summary = summarise(
        found.events,
        first_step=first.step,
        last_step=last.step,
        tokens=tokens_between(first, last) if known else 0,
        diverged=bool(found.diverged_at),
    )
    summary = known_only(summary, bool(found.judged or found.events))
    return {
        "specification": SPECIFICATION,
        "events": [event.to_dict() for event in sorted(found.events, key=_start)],
        "scores": scores_of(found.metrics),
        "rates": summary.pop("rates"),
        "summary": {**summary, "repeated_steps": repeated},
    }


def plain(value: object) -> object:
    """`value` for strict JSON: a number that is not finite becomes the string nan, inf or -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _start(event: SpikeEvent) -> int:
    return event.start_step
