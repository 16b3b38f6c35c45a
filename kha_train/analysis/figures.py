"""Draws standalone pictures of curves and histograms; the only module that uses matplotlib."""

# N points of a curve

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")
MAX_POINTS = 1500
"""A curve with more points is saved by the smallest and largest value of half as many stretches."""
SIZE_INCHES = (4.6, 2.8)
SHADES = ("tab:orange", "tab:red", "tab:purple", "tab:brown")
"""Colours of the shaded stretches in a standalone plot."""


def save_bars(path: Path, counts: Mapping[str, Mapping[str, int]], *, x_label: str, mark: str) -> None:
    """Draw the histograms `counts`, one below the other, each with its name (the label of its y axis) and one bar per
    class, in order, into the PNG file `path`, with `mark` in its metadata. Raises OSError when it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = SIZE_INCHES
    figure = Figure(figsize=(width, height * len(counts)), layout="constrained", dpi=150)
    for number, (name, bars) in enumerate(counts.items(), start=1):
        axes = figure.add_subplot(len(counts), 1, number)
        axes.bar(range(len(bars)), list(bars.values()), color="tab:blue")
        axes.set_xticks(range(len(bars)), list(bars), rotation=45, ha="right")
        axes.set_xlabel(x_label)
        axes.set_ylabel(name)
    FigureCanvasAgg(figure).print_png(path, metadata={"Creator": mark})


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most `most` (two or more) of `values`, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[number * (len(values) - 1) // (most - 1)] for number in range(most)]


def thin(x_N: np.ndarray, y_N: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points that keep every peak: the smallest and largest value of each stretch, in order."""
    if len(x_N) <= most:
        return x_N, y_N
    kept = []
    for stretch in np.array_split(np.arange(len(x_N)), most // 2):
        finite = stretch[np.isfinite(y_N[stretch])]
        # A stretch of nan keeps one point, which draws the gap.
        extremes = {finite[y_N[finite].argmin()], finite[y_N[finite].argmax()]} if len(finite) else {stretch[0]}
        kept += sorted(extremes)
    return x_N[kept], y_N[kept]


def save_shaded(
    path: Path,
    x_N: np.ndarray,
    y_N: np.ndarray,
    shades: Sequence[tuple[float, float, int]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    mark: str,
) -> None:
    """The curve `y_N` over `x_N` as a standalone file (its suffix decides the format: .png, .svg, .pdf), with stretches
    (first, last, colour) of the x axis shaded and `mark` in its metadata. Non-finite values are gaps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for first, last, color in shades:
        axes.axvspan(first - 0.5, last + 0.5, color=SHADES[color], alpha=0.3, lw=0)
    axes.plot(*thin(x_N, np.where(np.isfinite(y_N), y_N, np.nan)), color="black", linewidth=0.7)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(linewidth=0.4, alpha=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Creator": mark})
