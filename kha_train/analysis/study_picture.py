"""A picture of a result: every arm's paired difference over seeds with its interval, over the band of an arm that does
not differ. Written as SVG by our own hand, so the same results give the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kha_train.analysis.report.svg import print_file, text, tick_labels, ticks
from kha_train.analysis.study_files import IntervalEntry, ResultFile
from kha_train.stability.monitor import DETECTOR

PICTURED = ("position", "bases", "ladder", "difference_law", "stability_rise")
"""The studies whose results have a picture: where to knock, on which base, at which size, by which law, how stable."""
SAME = "same_function"
"""The arm that computes what its reference computes, up to rounding."""
NAMES, WIDTH, ROW, TOP, BOTTOM = 170.0, 560.0, 20.0, 40.0, 36.0
"""Room for names, the whole width, the height of a row, and the room above and below, in units of the drawing."""


class Band(NamedTuple):
    """How far an arm differs that computes the same function."""

    low: float
    high: float


def picture(result: ResultFile, yardstick: ResultFile | None) -> str | None:
    """The picture of the first measure that has intervals; None where none has. `yardstick` is the result of the study
    that the study names, at the same scale: its arm `SAME` gives the band, and its arms are drawn below the others.
    Without it, the arm `SAME` of the study itself gives the band.
    """
    measure = next((one["name"] for one in result["measures"] if _shown(result, one["name"])), None)
    if measure is None:
        return None
    body = "".join(_drawn(result, measure, yardstick))
    return print_file(body, f"{result['study']}, scale {result['scale']}", f"kha_train {DETECTOR}")


def yardstick_of(result: ResultFile, others: Sequence[ResultFile]) -> ResultFile | None:
    """The newest of `others` that is of the yardstick of `result`, at its scale."""
    found = [one for one in others if (one["study"], one["scale"]) == (result["yardstick"], result["scale"])]
    return max(found, key=lambda one: one["ended"] or 0, default=None)


def _shown(result: ResultFile, measure: str) -> Mapping[str, IntervalEntry]:
    """The intervals of a measure by the words for their pair."""
    compared = [one for one in result["comparisons"] if one["measure"] == measure]
    return {f"{one['arm']} - {one['reference']}": one["interval"] for one in compared if one["interval"] is not None}


def _band(result: ResultFile, yardstick: ResultFile | None, measure: str) -> Band | None:
    for one in (*result["comparisons"], *(yardstick["comparisons"] if yardstick else ())):
        if (one["arm"], one["measure"]) == (SAME, measure) and one["interval"] is not None:
            return Band(one["interval"]["low"], one["interval"]["high"])
    return None


def _drawn(result: ResultFile, measure: str, yardstick: ResultFile | None) -> Iterator[str]:
    shown, yard = _shown(result, measure), _shown(yardstick, measure) if yardstick else {}
    band = _band(result, yardstick, measure)
    ends = [0.0, *(one[side] for one in (*shown.values(), *yard.values()) for side in ("low", "high"))]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin
    floor = TOP + ROW * (len(shown) + len(yard))

    def place(value: float) -> str:
        return f"{NAMES + (value - low) / (high - low) * (WIDTH - NAMES - 14):.1f}"

    seeds = min(len(one["differences"]) for one in result["comparisons"] if one["measure"] == measure)
    title = f"{result['study']}, scale {result['scale']}: paired difference of {measure}, 95 % over {seeds} seeds"
    yield f'<svg role="img" aria-label="{text(title)}" viewBox="0 0 {WIDTH:g} {floor + BOTTOM:g}">'
    yield f'<text x="4" y="14">{text(title)}</text>'
    if band:
        yield f'<path class="band f7" d="M{place(band.low)} {TOP}H{place(band.high)}V{floor}H{place(band.low)}z"/>'
        grey = f"; grey: the study {yardstick['study']}" if yardstick and yard else ""
        yield f'<text x="4" y="30">shaded: {SAME}, which differs by rounding alone{text(grey)}</text>'
    values = ticks(low, high)
    for value, label in zip(values, tick_labels(values), strict=True):
        yield f'<path class="grid" d="M{place(value)} {TOP}V{floor}"/>'
        yield f'<text x="{place(value)}" y="{floor + 14}" text-anchor="middle">{label}</text>'
    yield f'<path class="axis" d="M{place(0.0)} {TOP}V{floor}"/>'
    rows = [*((pair, one, 0) for pair, one in shown.items()), *((pair, one, 7) for pair, one in yard.items())]
    for number, (pair, one, color) in enumerate(rows):
        middle = TOP + ROW * (number + 0.5)
        yield f'<text x="{NAMES - 8}" y="{middle + 3.5}" text-anchor="end">{text(pair)}</text>'
        yield f'<path class="c s{color}" d="M{place(one["low"])} {middle}H{place(one["high"])}"/>'
        yield f'<circle class="f{color}" cx="{place(one["mean"])}" cy="{middle}" r="3.5"/>'
    better = "right" if _larger_is_better(result, measure) else "left"
    yield f'<text x="{WIDTH - 14}" y="{floor + 29}" text-anchor="end">better: {better} of zero</text></svg>'


def _larger_is_better(result: ResultFile, measure: str) -> bool:
    return next(one["larger_is_better"] for one in result["measures"] if one["name"] == measure)
