"""Section: the paired difference of train loss at equal steps, a pair each and over seeds."""

# N common steps of a pair  P parts of them

from __future__ import annotations

import numpy as np

from kha_train.analysis.compare import Pair, no_difference
from kha_train.analysis.report.content import Block, Figure, Result, Section, Series, Style, Table
from kha_train.analysis.report.context import Context, bounds, series
from kha_train.analysis.report.curves import over_seeds_curve, pair_differences
from kha_train.analysis.statistics import MIN_BLOCK

PARTS = 60
SHARE = 0.8
EACH = (
    "Loss of the run minus loss of its reference at the same step; below zero the run has the lower loss. Bold: "
    "exponential average, half-life 1 % of the longest run. Dotted: the mean over the last half of the common steps. "
    "The bands are descriptive, and no interval for other seeds or other steps: 80 % of the differences of single "
    "steps lie in the band around the curve."
)
TOGETHER = (
    "Mean over seeds of the smoothed differences of the fair pairs. The band is descriptive: it reaches from the "
    "lowest to the highest seed, and is no interval."
)
UNFAIR = " (unfair)"


def section(context: Context) -> Section | None:
    """A figure of the pairs, one over seeds where there are several, and the result of every pair in words."""
    comparison = context.comparison
    if not comparison.pairs:
        return None
    found = pair_differences(context, comparison.pairs)
    blocks: list[Block] = []
    if found and not context.grouped:
        drawn = [(pair, _curves(context, pair, steps_N, values_N)) for pair, steps_N, values_N in found]
        curves = [one for _, parts in drawn for one in parts]
        calm = [one for pair, parts in drawn if not _lost(context, pair) for one in parts]
        blocks.append(_figure(context, "difference", "Paired difference, one a pair", EACH, curves, calm))
    together: list[Series] = []
    for variant in list(context.variants)[1:]:
        by_seed: dict[int | None, tuple[Pair, np.ndarray, np.ndarray]] = {}
        for one in found:
            run = context.runs[one[0].other]
            if run.variant == variant and not one[0].caveats:
                by_seed.setdefault(run.seed, one)
        if len(by_seed) > 1:
            together += over_seeds_curve(context, variant, list(by_seed.values()))
    if together:
        blocks.append(
            _figure(context, "difference-seeds", "Paired difference over seeds", TOGETHER, together, together)
        )
    results = [_result(context, pair) for pair in comparison.pairs]
    if context.grouped:
        head = ("pair", "train loss", "how", "")
        blocks.append(Table(head, tuple(one.row() for one in results), f"All {len(results)} pairs"))
    else:
        blocks += results
    return Section("difference", "Paired difference of train loss", tuple(blocks))


def _figure(context: Context, name: str, title: str, caption: str, curves: list[Series], calm: list[Series]) -> Figure:
    """A figure whose y axis holds zero and follows the `calm` curves, if there are any, after the first tenth of the
    steps.
    """
    last = max(float(one.x["steps"][-1]) for one in curves)
    late = [one for one in calm or curves if one.kind != "raw"]
    parts = [
        values[one.x["steps"] > last / 10]
        for one in late
        for values in (one.y_N, one.low_N, one.high_N)
        if values is not None
    ]
    shown = bounds([np.array([*(bounds(parts, 0.01) or ()), 0.0])])
    return Figure(name, title, caption, "nats per token", context.axes, tuple(curves), shown, zero=True)


def _curves(context: Context, pair: Pair, steps_N: np.ndarray, values_N: np.ndarray) -> list[Series]:
    """The difference of one pair: raw, the band of its single steps, smoothed, and the mean of its last half."""
    style, x = _style(context, pair), context.x(pair.other, steps_N)
    names = f"{context.labels[pair.other]} \N{MINUS SIGN} {context.labels[pair.reference]}"
    name = f"{names}{UNFAIR if pair.caveats else ''}"
    found = [series(name, style, "raw", x, values_N), *_band(name, style, x, values_N)]
    found.append(series(name, style, "line", x, context.smooth(values_N)))
    if pair.difference is not None and len(steps_N) > 1:
        inside = [int(np.searchsorted(steps_N, pair.first_step)), len(steps_N) - 1]
        ends = {key: known[inside] for key, known in x.items()}
        found.append(Series(name, style, "mean", ends, np.full(2, pair.difference.mean)))
    return found


def _lost(context: Context, pair: Pair) -> list[str]:
    """The labels of the runs of a pair that diverged or did not recover."""
    return [context.labels[run] for run in (pair.reference, pair.other) if context.lost(run)]


def _style(context: Context, pair: Pair) -> Style:
    """The style of the pair's run; where all pairs are of one variant, each has a colour of its own."""
    if len(context.variants) > 2:
        return context.style(pair.other)
    number = context.comparison.pairs.index(pair)
    return Style(number, number)


def _band(name: str, style: Style, x: dict[str, np.ndarray], values_N: np.ndarray) -> list[Series]:
    """The range of most differences in each of `PARTS` parts of the steps; nothing where parts would be too short."""
    if len(values_N) < 10 * PARTS:
        return []
    parts = np.array_split(np.arange(len(values_N)), PARTS)
    edges = [(1 - SHARE) / 2, (1 + SHARE) / 2]
    known = [values_N[part][np.isfinite(values_N[part])] for part in parts]
    ranges = [np.quantile(one, edges) if len(one) else np.full(2, np.nan) for one in known]
    low_P, high_P = np.array(ranges).T
    middle_P = np.array([part[len(part) // 2] for part in parts])
    places = {key: values[middle_P] for key, values in x.items()}
    return [Series(name, style, "band", places, (low_P + high_P) / 2, low_P, high_P)]


def _result(context: Context, pair: Pair) -> Result:
    """The result of a pair in words. It is emphasised for a fair pair alone."""
    other, reference = context.labels[pair.other], context.labels[pair.reference]
    names = f"{other} \N{MINUS SIGN} {reference}"
    warnings = tuple(["This is not fair; the reasons stand above."] if pair.caveats else [])
    warnings += tuple(f"{label} diverged or did not recover." for label in _lost(context, pair))
    found, interval = pair.difference, pair.interval
    if found is None:
        return Result(names, no_difference(pair), False, warnings=warnings)
    over = f"{pair.first_step} to {pair.last_step} (the last half of the common steps, {found.count} finite pairs)"
    if interval is None:
        blocks = f" A block has {found.block} steps, at least {MIN_BLOCK} and more where steps correlate."
        words = (
            f"The difference of train loss at equal steps is {found.mean:+.4f} nats per token, mean over steps {over}; "
            f"{found.no_interval}.{blocks}"
        )
        return Result(names, "no claim", False, explained=words, warnings=warnings)
    words = (
        f"Difference of train loss at equal steps, mean over steps {over}. Below zero: {other} has the lower loss. "
        f"Interval: Student's t over {interval.count // interval.block} blocks of {interval.block} steps, a length "
        "that follows the autocorrelation; it holds for this seed and this order of data only."
    )
    beside = f"nats per token, descriptive 95 % interval {interval.low:+.4f} to {interval.high:+.4f}"
    return Result(names, f"{interval.mean:+.4f}", context.fair(pair), beside, words, warnings)
