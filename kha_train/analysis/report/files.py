"""The files beside the page: each figure as a picture for print, and its numbers."""

# N points of a series  R, C rows and columns of a matrix

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np

from kha_train.analysis.heatmap import heatmap
from kha_train.analysis.report.content import Figure, Maps, Section
from kha_train.analysis.report.svg import LIGHT, print_file, standalone, text

SIDE, LABEL, ACROSS = 110, 16, 4
"""Sizes of a printed heat-map and its label, and how many stand side by side."""
CURVES, CELLS = ("series", "kind"), ("matrix", "row", "column", "value")
CSV_HEADS = (f"{','.join(CURVES)},".encode(), f"{','.join(CELLS)}\n".encode())
"""First bytes of the numbers of a figure, and of a heat-map."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters that make a spreadsheet compute a cell."""


def files_of(sections: Sequence[Section], mark: str) -> dict[str, str]:
    """The contents of all files by name. Every picture holds `mark`."""
    found: dict[str, str] = {}
    for section in sections:
        for figure in section.figures():
            found |= {f"{figure.name}-{axis.key}.svg": standalone(figure, axis, mark) for axis in figure.axes}
            found[f"{figure.name}.csv"] = _numbers(figure)
        for maps in section.maps():
            found[f"{maps.name}.svg"] = _picture(maps, mark)
            found[f"{maps.name}.csv"] = _cells(maps)
    return found


def _numbers(figure: Figure) -> str:
    """The drawn points of a figure as CSV: one row a point, its place on every axis, its value, and its band."""
    keys = [axis.key for axis in figure.axes]
    rows = []
    for one in figure.series:
        nothing_N = np.full(len(one.y_N), np.nan)
        places = [one.x.get(key, nothing_N) for key in keys]
        band = [nothing_N if edge is None else edge for edge in (one.low_N, one.high_N)]
        for values in zip(*(column.tolist() for column in (*places, one.y_N, *band)), strict=True):
            rows.append([_name(one.name), one.kind, *map(_number, values)])
    return _csv([*CURVES, *keys, "value", "low", "high"], rows)


def _cells(maps: Maps) -> str:
    """Every number of the matrices, with its row and column."""
    rows = [
        [_name(label), *place, _number(float(value))]
        for label, values_RC in maps.maps
        for place, value in np.ndenumerate(values_RC)
    ]
    return _csv(CELLS, rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return file.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"


def _name(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(FORMULA) else name


def _picture(maps: Maps, mark: str) -> str:
    """All heat-maps in one drawing, each below its label."""
    across = min(ACROSS, len(maps.maps))
    parts = []
    for number, (label, values_RC) in enumerate(maps.maps):
        left, top = number % across * (SIDE + 10), number // across * (SIDE + LABEL + 8)
        placed = f'<svg x="{left}" y="{top + LABEL}" width="{SIDE}" height="{SIDE}" class="map" '
        parts.append(f'<text x="{left}" y="{top + LABEL - 4}">{text(label)}</text>')
        parts.append(heatmap(values_RC, label, maps.largest).replace('<svg class="map" ', placed, 1))
    height = math.ceil(len(maps.maps) / across) * (SIDE + LABEL + 8)
    body = f'<svg viewBox="0 0 {across * (SIDE + 10)} {height}">{"".join(parts)}</svg>'
    return print_file(body, maps.title, mark, f"--plus: {LIGHT[0]}; --minus: {LIGHT[1]}; --card: #fff;")
