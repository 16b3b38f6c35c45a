"""Section: train loss, raw and smoothed, with the loss events marked; the whole curves, and their second half."""

# N lines of a record

from __future__ import annotations

import numpy as np

from kha_train.analysis.report.content import Figure, Kind, Section, Series
from kha_train.analysis.report.context import Context, bounds, series
from kha_train.analysis.report.curves import late, loss_curves

CAPTION = (
    "Token cross-entropy of each optimiser step over the global batch, without auxiliary terms. Faint: as recorded. "
    "Bold: exponential average, half-life 1 % of the longest run. Gaps: not a finite number. A triangle marks a spike "
    "at its highest loss, a cross an event from which the loss did not return. The axes do not follow runs that "
    "diverged."
)
SHORTEST = 4
"""A curve with fewer points has no second half worth a figure."""
GROUPED = (
    "More than eight runs, so each variant is one curve: the mean of its runs, each smoothed by an exponential average "
    "with a half-life of 1 % of the longest run. The band reaches from its lowest to its highest run. Loss events are "
    "in the tables below."
)


def section(context: Context) -> Section:
    """Two figures: all steps, and the second half with an axis that shows what differs."""
    curves = loss_curves(context)
    caption = GROUPED if context.grouped else CAPTION
    drawn = (*curves, *([] if context.grouped else _events(context)))
    whole = Figure("loss", "Train loss", caption, "nats per token", context.axes, drawn, _range(context, curves))
    if max(len(one.y_N) for one in drawn) < SHORTEST:
        return Section("loss", "Train loss", (whole,))
    second = tuple(late(drawn))
    zoomed = _range(context, [one for one in second if one.kind in ("line", "band")], True)
    half = "The second half of the steps; the y axis follows the smoothed curves, so raw values may lie outside."
    near = Figure("loss-late", "Train loss, second half", half, "nats per token", context.axes, second, zoomed)
    return Section("loss", "Train loss", (whole, near))


def _range(context: Context, curves: list[Series], smooth: bool = False) -> tuple[float, float] | None:
    """The y axis: all values of runs that did not diverge; of all runs where every one did."""
    if context.grouped:
        alive = {
            context.variant_style(variant)
            for variant, runs in context.variants.items()
            if not all(map(context.lost, runs))
        }
    else:
        alive = {context.style(run) for run in range(len(context.runs)) if not context.lost(run)}
    calm = [one for one in curves if one.style in alive] or curves
    parts = [values for one in calm for values in (one.y_N, one.low_N, one.high_N) if values is not None]
    return bounds(parts, 0.0 if smooth else 0.002)


def _events(context: Context) -> list[Series]:
    """The marks of the loss events of every run."""
    found = []
    for number, (run, summary) in enumerate(zip(context.runs, context.comparison.summaries, strict=True)):
        losses_N = run.column("train/loss")
        kinds: dict[Kind, list[int]] = {"spike": [], "diverged": []}
        for event in summary.stability.events:
            first, last = np.searchsorted(run.steps, (event.start_step, event.end_step + 1))
            if first == last:
                continue
            inside = losses_N[first:last]
            highest = int(np.argmax(np.where(np.isfinite(inside), inside, -np.inf)))
            ended = event.kind in ("unrecovered", "open")
            kinds["diverged" if ended else "spike"].append(int(first) if ended else int(first) + highest)
        for kind, places in kinds.items():
            if places:
                name = f"{run.label}: {'spike' if kind == 'spike' else 'did not return'}"
                x = context.x(number, run.steps[places])
                found.append(series(name, context.style(number), kind, x, losses_N[places]))
    return found
