"""The loss events of each variant over its runs: rates with the spread over seeds, areas, and runs that diverged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kha_train.analysis.runs import RunData
from kha_train.analysis.statistics import pooled_rate
from kha_train.analysis.summary import Summary

UNIT = 10_000
"""Steps that a printed rate counts."""


@dataclass(frozen=True)
class Spread:
    """The mean of one value per run, the lowest and the highest. For skewed values, such as areas of events: Student's
    interval of those, where nominally 95 %, covers 39 to 95 %.
    """

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class VariantEvents:
    """The loss events of the runs of one variant. `diverged` and `unrecovered` are labels of runs: the spikes of such a
    run say nothing good about it. `rate` is the pooled number of spikes per `UNIT` steps with its 95 % interval, and
    `rates` are those of the single runs, None where a run was too short to be judged. `areas` are the sums of the
    losses above the baseline, all events together, per `UNIT` steps, in nats x steps; `area` is their spread over runs.
    A run that diverged or did not recover counts neither in `spikes`, `steps` and `rate` nor in `area`: it would lower
    them.
    """

    variant: str
    runs: tuple[str, ...]
    diverged: tuple[str, ...]
    unrecovered: tuple[str, ...]
    spikes: int
    steps: int
    rate: dict[str, float | None]
    rates: tuple[float | None, ...]
    areas: tuple[float | None, ...]
    area: Spread | None
    share_in_events: tuple[float | None, ...]


def variant_events(runs: Sequence[RunData], summaries: Sequence[Summary]) -> tuple[VariantEvents, ...]:
    """The events of every variant, in the order of the runs."""
    by_variant: dict[str, list[tuple[RunData, Summary]]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        by_variant.setdefault(run.variant, []).append((run, summary))
    return tuple(_of_variant(variant, members) for variant, members in by_variant.items())


def _of_variant(variant: str, members: Sequence[tuple[RunData, Summary]]) -> VariantEvents:
    reports = [summary.stability for _, summary in members]
    calm = [not (one.honesty["diverged"] or one.honesty["unrecovered"]) for _, one in members]
    judged = [one.summary for one, counts in zip(reports, calm, strict=True) if counts and one.judged]
    counts, steps = [one["spikes"] for one in judged], [one["steps"] for one in judged]
    areas = [_per_unit(one.summary["area_total"], one.summary["steps"]) if one.judged else None for one in reports]
    rates = [_per_unit(one.summary["spikes"], one.summary["steps"]) if one.judged else None for one in reports]
    return VariantEvents(
        variant=variant,
        runs=tuple(run.label for run, _ in members),
        diverged=tuple(run.label for run, summary in members if summary.honesty["diverged"]),
        unrecovered=tuple(run.label for run, summary in members if summary.honesty["unrecovered"]),
        spikes=sum(counts),
        steps=sum(steps),
        rate=pooled_rate(counts, [count / UNIT for count in steps]),
        rates=tuple(rates),
        areas=tuple(areas),
        area=_spread([area for area, counts in zip(areas, calm, strict=True) if counts and area is not None]),
        share_in_events=tuple(report.summary["steps_in_spike_frac"] for report in reports),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(math.fsum(values) / len(values), min(values), max(values)) if values else None


def _per_unit(count: float, steps: int) -> float:
    return float(count) * UNIT / steps
