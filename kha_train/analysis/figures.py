"""Draws curves as SVG for an HTML page; the only module that uses matplotlib.

Colours are CSS variables (`--series-0`, `--ink`, `--grid`), so that one drawing works on light and dark pages. Text
stays text and uses the page's font.
"""

# N points of a curve

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_POINTS = 1500
"""A curve with more points is drawn by the smallest and largest value of half as many stretches."""
INK, GRID = "#0a01ff", "#0a02ff"
SIZE_INCHES = (4.6, 2.8)
SHADES = ("tab:orange", "tab:red", "tab:purple", "tab:brown")
"""Colours of the shaded stretches in a standalone plot."""


@dataclass(frozen=True)
class Curve:
    """One series: `raw_N` (faint; may hold nan) and `smooth_N` (bold) over `x_N`; `color` counts from 0."""

    x_N: np.ndarray
    color: int
    raw_N: np.ndarray | None = None
    smooth_N: np.ndarray | None = None
    marker: bool = False


@dataclass(frozen=True)
class Band:
    """A horizontal mean with its interval, drawn from `first` to `last` on the x axis."""

    first: float
    last: float
    mean: float
    low: float
    high: float
    color: int


def draw(name: str, curves: Sequence[Curve], *, x_label: str, y_label: str, bands: Sequence[Band] = ()) -> str:
    """The curves as an `<svg>` element whose ids begin with `name`; with bands, a zero line is drawn."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    style |= {"font.size": 9, "axes.linewidth": 0.6, "path.simplify": True}
    with rc_context(style):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        _style(axes, x_label, y_label)
        for band in bands:
            axes.axhline(0.0, color=INK, linewidth=0.8)
            axes.fill_between([band.first, band.last], band.low, band.high, color=_color(band.color), alpha=0.22, lw=0)
            axes.plot([band.first, band.last], [band.mean] * 2, color=_color(band.color), lw=1.2, linestyle=(0, (4, 2)))
        for curve in curves:
            _plot(axes, curve)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _for_page(file.getvalue(), name)


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


def thin(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points that keep every peak: the smallest and largest value of each stretch, in order."""
    if len(x_N) <= MAX_POINTS:
        return x_N, y_N
    kept = []
    for stretch in np.array_split(np.arange(len(x_N)), MAX_POINTS // 2):
        finite = stretch[np.isfinite(y_N[stretch])]
        # A stretch of nan keeps one point, which draws the gap.
        extremes = {finite[y_N[finite].argmin()], finite[y_N[finite].argmax()]} if len(finite) else {stretch[0]}
        kept += sorted(extremes)
    return x_N[kept], y_N[kept]


def _plot(axes: Any, curve: Curve) -> None:
    color = _color(curve.color)
    if curve.raw_N is not None:
        axes.plot(*thin(curve.x_N, _finite(curve.raw_N)), color=color, linewidth=0.6, alpha=0.35)
    if curve.smooth_N is not None:
        marker = {"marker": "o", "markersize": 3.5} if curve.marker else {}
        axes.plot(*thin(curve.x_N, _finite(curve.smooth_N)), color=color, linewidth=1.6, **marker)


def _style(axes: Any, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=INK, labelcolor=INK, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _color(number: int) -> str:
    return f"#0a00{number:02x}"


def _for_page(document: str, name: str) -> str:
    """The `<svg>` element alone, scalable, with its own ids and the page's colours and font."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    return re.sub(r"#0a00([0-9a-f]{2})", lambda match: f"var(--series-{int(match[1], 16)})", svg)


def save_shaded(
    path: Path,
    curve: Curve,
    shades: Sequence[tuple[float, float, int]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    mark: str,
) -> None:
    """The curve as a standalone file (its suffix decides the format: .png, .svg, .pdf), with stretches (first, last,
    colour) of the x axis shaded and `mark` in its metadata. Non-finite values are gaps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for first, last, color in shades:
        axes.axvspan(first - 0.5, last + 0.5, color=SHADES[color], alpha=0.3, lw=0)
    assert curve.raw_N is not None
    axes.plot(*thin(curve.x_N, _finite(curve.raw_N)), color="black", linewidth=0.7)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(linewidth=0.4, alpha=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Creator": mark})
