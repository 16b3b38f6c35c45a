"""A picture of a result: every arm's paired difference over seeds with its interval, over the band of an arm that does
not differ. Written as SVG by our own hand, so the same results give the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kha_train.analysis.report.svg import print_file, text, tick_labels, ticks
from kha_train.analysis.study_files import ComparisonEntry, IntervalEntry, ResultFile
from kha_train.stability.monitor import DETECTOR

PICTURED = ("position", "bases", "ladder", "difference_law", "stability_rise")
"""The studies whose results have a picture: where to knock, on which base, at which size, by which law, how stable."""
SAME = "same_function"
"""The arm that computes what its reference computes, up to rounding."""
ALIKE = 1.25
"""Models whose parameters differ by less than this factor share a yardstick, if they read as many tokens."""
NAMES, LETTER, PLOT, EDGE, ROW, TOP, BOTTOM = 170.0, 6.2, 376.0, 14.0, 20.0, 40.0, 36.0
"""Room for names at least, of a letter, for intervals and beside them; the height of a row, and the room above and
below, in units of the drawing.
"""
BLUE, GREY = 0, 7
"""Colours of the study and of its yardstick."""


class Row(NamedTuple):
    """An arm - its reference, with the interval of the difference; without one, what there is instead."""

    pair: str
    interval: IntervalEntry | None
    signs: str
    color: int


def picture(result: ResultFile, yardstick: ResultFile | None) -> str | None:
    """The picture of the first measure that has intervals; None where none has. `yardstick` is the result of the study
    that the study names: its arm `SAME` gives the band, and its arms are drawn below the others. Without it, the arm
    `SAME` of the study itself gives the band.
    """
    measure = next((one["measure"] for one in result["comparisons"] if one["interval"] is not None), None)
    if measure is None:
        return None
    body = "".join(_drawn(result, measure, yardstick))
    return print_file(body, f"{result['study']}, scale {result['scale']}", f"kha_train {DETECTOR}")


def yardstick_of(result: ResultFile, others: Sequence[ResultFile]) -> ResultFile | None:
    """The newest of `others` that is of the yardstick of `result`, at its scale, with references of about its size."""
    named = [one for one in others if (one["study"], one["scale"]) == (result["yardstick"], result["scale"])]
    return max((one for one in named if _alike(result, one)), key=lambda one: one["ended"] or 0, default=None)


def _alike(result: ResultFile, other: ResultFile) -> bool:
    arms = [arm for one in (result, other) for arm in one["arms"].values() if arm["reference"] is None]
    sizes = [arm["size"] for arm in arms if arm["size"]]
    parameters = [size["parameters"] for size in sizes]
    return not sizes or (len({size["tokens"] for size in sizes}) == 1 and max(parameters) < ALIKE * min(parameters))


def _rows(comparisons: Sequence[ComparisonEntry], measure: str, color: int) -> list[Row]:
    return [
        Row(
            f"{one['arm']} - {one['reference']}",
            one["interval"],
            f"no interval: {one['better']} better, {one['worse']} worse",
            color,
        )
        for one in comparisons
        if one["measure"] == measure
    ]


def _drawn(result: ResultFile, measure: str, yardstick: ResultFile | None) -> Iterator[str]:
    grey = _rows(yardstick["comparisons"] if yardstick else [], measure, GREY)
    rows = [*_rows(result["comparisons"], measure, BLUE), *grey]
    same = next((row.interval for row in rows if row.pair.startswith(f"{SAME} - ")), None)
    seeds = min(len(one["differences"]) for one in result["comparisons"] if one["measure"] == measure)
    title = f"{result['study']}, scale {result['scale']}: paired difference of {measure}, 95 % over {seeds} seeds"
    names, floor = max(NAMES, *(LETTER * len(row.pair) + 12 for row in rows)), TOP + ROW * len(rows)
    yield f'<svg role="img" aria-label="{text(title)}" viewBox="0 0 {names + PLOT + EDGE:g} {floor + BOTTOM:g}">'
    yield f'<text x="4" y="14">{text(title)}</text>'
    if same:
        told = f"; grey: the study {yardstick['study']}" if yardstick and grey else ""
        yield f'<text x="4" y="30">shaded: {SAME}, which differs by rounding alone{text(told)}</text>'
    yield from _plot(rows, same, names, floor)
    better = "right" if _larger_is_better(result, measure) else "left"
    yield f'<text x="{names + PLOT:g}" y="{floor + 29:g}" text-anchor="end">better: {better} of zero</text></svg>'


def _plot(rows: Sequence[Row], same: IntervalEntry | None, names: float, floor: float) -> Iterator[str]:
    """The axis, the band of `same` and the rows, to the right of `names`."""
    ends = [0.0, *(row.interval[side] for row in rows if row.interval for side in ("low", "high"))]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"{names + (value - low) / (high - low) * PLOT:.1f}"

    if same:
        left, right = place(same["low"]), place(same["high"])
        yield f'<path class="band f7" d="M{left} {TOP}H{right}V{floor}H{left}z"/>'
    values = ticks(low, high)
    for value, label in zip(values, tick_labels(values), strict=True):
        yield f'<path class="grid" d="M{place(value)} {TOP}V{floor}"/>'
        yield f'<text x="{place(value)}" y="{floor + 14}" text-anchor="middle">{label}</text>'
    yield f'<path class="axis" d="M{place(0.0)} {TOP}V{floor}"/>'
    for number, row in enumerate(rows):
        middle = TOP + ROW * (number + 0.5)
        yield f'<text x="{names - 8:g}" y="{middle + 3.5}" text-anchor="end">{text(row.pair)}</text>'
        if row.interval is None:
            yield f'<text x="{names + 8:g}" y="{middle + 3.5}">{text(row.signs)}</text>'
            continue
        yield f'<path class="c s{row.color}" d="M{place(row.interval["low"])} {middle}H{place(row.interval["high"])}"/>'
        yield f'<circle class="f{row.color}" cx="{place(row.interval["mean"])}" cy="{middle}" r="3.5"/>'


def _larger_is_better(result: ResultFile, measure: str) -> bool:
    return next(one["larger_is_better"] for one in result["measures"] if one["name"] == measure)
