"""Curves of train loss and of its paired differences, a run or a variant each."""

# N lines of a record  S steps that any run of a variant has  R runs of a variant

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kha_train.analysis.compare import Pair, loss_difference
from kha_train.analysis.report.content import Series
from kha_train.analysis.report.context import Context, finite, series, thinned


def loss_curves(context: Context) -> list[Series]:
    """The train loss of every run, raw and smoothed; of every variant, where there are too many runs."""
    if context.grouped:
        return [one for variant, runs in context.variants.items() for one in _variant_loss(context, variant, runs)]
    found = []
    for number, label in enumerate(context.labels):
        style, x = context.style(number), context.x(number)
        found.append(series(label, style, "raw", x, context.losses[number]))
        found.append(series(label, style, "line", x, context.smoothed[number]))
    return found


def _variant_loss(context: Context, variant: str, runs: Sequence[int]) -> list[Series]:
    """The mean of the smoothed curves of `runs`, and the band from the lowest to the highest. Runs that diverged are
    left out, unless all did; the name says so.
    """
    calm = [run for run in runs if not context.lost(run)]
    left_out = f", {len(runs) - len(calm)} diverged left out" if 0 < len(calm) < len(runs) else ""
    runs = calm or runs
    steps_S = np.unique(np.concatenate([context.runs[run].steps for run in runs]))
    curves_RS = np.stack([_spread(context.runs[run].steps, context.smoothed[run], steps_S) for run in runs])
    style, x = context.variant_style(variant), _mean_x(context, runs, steps_S)
    mean_S, low_S, high_S = _over_runs(curves_RS)
    name = f"{variant}, mean of {len(runs)} run{'s' * (len(runs) != 1)}{left_out}"
    return [
        series(f"{variant}, lowest to highest run", style, "band", x, mean_S, (low_S, high_S)),
        series(name, style, "line", x, mean_S),
    ]


def pair_differences(context: Context, pairs: Sequence[Pair]) -> list[tuple[Pair, np.ndarray, np.ndarray]]:
    """(pair, steps [N], difference [N]) of those with a difference."""
    found = []
    for pair in pairs:
        steps_N, difference_N = loss_difference(context.runs[pair.reference], context.runs[pair.other])
        if pair.different_from is None and np.isfinite(difference_N).any():
            found.append((pair, steps_N, difference_N))
    return found


def over_seeds_curve(
    context: Context, variant: str, curves: Sequence[tuple[Pair, np.ndarray, np.ndarray]]
) -> list[Series]:
    """The mean over seeds of the smoothed differences in `curves`, and the band from the lowest to the highest."""
    steps_S = np.unique(np.concatenate([steps_N for _, steps_N, _ in curves]))
    curves_RS = np.stack([_spread(steps_N, context.smooth(values_N), steps_S) for _, steps_N, values_N in curves])
    mean_S, low_S, high_S = _over_runs(curves_RS)
    style, x = context.variant_style(variant), _mean_x(context, [pair.other for pair, _, _ in curves], steps_S)
    count = len(curves)
    return [
        series(f"{variant}, lowest to highest of {count} seeds", style, "band", x, mean_S, (low_S, high_S)),
        series(f"{variant}, mean of {count} seeds", style, "line", x, mean_S),
    ]


def grouped_points(context: Context, curves: Sequence[Series]) -> list[Series]:
    """Curves of single runs, named by their labels, as they are; those of a variant as their mean, with a band over its
    runs, where there are too many runs; with as many points as can be seen.
    """
    if not context.grouped:
        return [thinned(one) for one in curves]
    found = []
    for variant, runs in context.variants.items():
        members = [one for one in curves if one.name in {context.labels[run] for run in runs}]
        if members:
            steps_S = np.unique(np.concatenate([one.x["steps"] for one in members]))
            values_RS = np.stack([_spread(one.x["steps"], one.y_N, steps_S) for one in members])
            keys = set.intersection(*(set(one.x) for one in members))
            x = {
                key: _over_runs(np.stack([_spread(one.x["steps"], one.x[key], steps_S) for one in members]))[0]
                for key in members[0].x
                if key in keys
            }
            name = f"{variant}, mean and range of {len(members)} runs"
            mean_S, low_S, high_S = _over_runs(values_RS)
            found.append(series(name, context.variant_style(variant), "points", x, mean_S, (low_S, high_S)))
    return found


def late(parts: Sequence[Series]) -> list[Series]:
    """The second halves of series, by their steps."""
    last = max((float(one.x["steps"][-1]) for one in parts if len(one.y_N)), default=0.0)
    return [_kept(one, one.x["steps"] > last / 2) for one in parts]


def _kept(one: Series, inside: np.ndarray) -> Series:
    return replace(
        one,
        x={key: values[inside] for key, values in one.x.items()},
        y_N=one.y_N[inside],
        low_N=None if one.low_N is None else one.low_N[inside],
        high_N=None if one.high_N is None else one.high_N[inside],
    )


def _spread(steps_N: np.ndarray, values_N: np.ndarray, steps_S: np.ndarray) -> np.ndarray:
    """The values at `steps_S`; nan where a curve lacks the step. Its other steps are left out."""
    spread_S = np.full(len(steps_S), np.nan)
    _, places, known = np.intersect1d(steps_S, steps_N, return_indices=True)
    spread_S[places] = values_N[known]
    return spread_S


def _over_runs(curves_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, lowest, highest) at every step over the curves that are finite there; nan where none is."""
    curves_RS = finite(curves_RS)
    known_S = ~np.isnan(curves_RS).all(axis=0)
    parts = []
    for function in (np.nanmean, np.nanmin, np.nanmax):
        part_S = np.full(curves_RS.shape[1], np.nan)
        part_S[known_S] = function(curves_RS[:, known_S], axis=0)
        parts.append(part_S)
    return parts[0], parts[1], parts[2]


def _mean_x(context: Context, runs: Sequence[int], steps_S: np.ndarray) -> dict[str, np.ndarray]:
    """The axes at `steps_S`: the mean over `runs` of those that all of them have."""
    known = [context.x(run) for run in runs]
    found = {}
    for key in known[0]:
        if all(key in one for one in known):
            columns_RS = np.stack(
                [_spread(context.runs[run].steps, one[key], steps_S) for run, one in zip(runs, known, strict=True)]
            )
            found[key] = _over_runs(columns_RS)[0]
    return found
