"""Draws a figure of the report as SVG. Colours are classes, so that one drawing fits light and dark pages and print."""

# N points of a series

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from kha_train.analysis.report.content import Axis, Figure, Series
from kha_train.literal import visible

LIGHT = ("#1261b5", "#c4501b", "#0f7d5c", "#9a3a96", "#8a6d00", "#b3274a", "#3f6f8f", "#6a6a6a")
DARK = ("#6cb2ff", "#ff9a62", "#4fd3a5", "#e08bdb", "#e0c04a", "#ff7f9d", "#9cc6e0", "#b5b5b5")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 4", "2 5", "9 3 2 3 2 3")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down", "bar", "plus")
WIDTH, HEIGHT = 400.0, 226.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 20.0, 34.0
ROW, LETTER = 15.0, 5.9
"""Height of a row of the legend and the mean width of a letter, in the units of the drawing."""
LONGEST = 58
"""Characters of a name in a legend; longer ones are shortened in the middle."""

RULES = """svg .c { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
svg .raw { stroke-width: .6; opacity: .38; }
svg .band { opacity: .17; stroke: none; } svg .mean { stroke-width: 1.1; } svg .mark { fill: none; stroke-width: 1.2; }
svg .spike { stroke: none; } svg .axis { stroke: var(--ink); stroke-width: .7; fill: none; }
svg .grid { stroke: var(--grid); stroke-width: .7; fill: none; } svg text { fill: var(--ink); font-size: 11px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }"""


def color_rules() -> str:
    """The style sheet of every drawing; the variables are set beside it."""
    found = [f"svg .s{number} {{ stroke: var(--s{number}); }} " for number in range(len(LIGHT))]
    found += [f"svg .f{number} {{ fill: var(--s{number}); }} " for number in range(len(LIGHT))]
    return RULES + "".join(found)


def variables(palette: Sequence[str]) -> str:
    """The declarations of the colours of `palette`."""
    return " ".join(f"--s{number}: {color};" for number, color in enumerate(palette))


def standalone(figure: Figure, axis: Axis, mark: str) -> str:
    """The figure as a file for print."""
    return print_file(draw(figure, axis), figure.title, mark)


def print_file(body: str, title: str, mark: str, further: str = "") -> str:
    """The `<svg>` element `body` as a file: black on white, with `mark` in a comment, and `further` variables."""
    style = f":root {{ --ink: #000; --grid: #ddd; {variables(LIGHT)} {further} }} {color_rules()}"
    head = body.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    end = head.index(">") + 1
    title = f"<title>{text(title)}</title>"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<!-- {mark} -->\n{head[:end]}{title}<style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{head[end:]}\n'
    )


@dataclass(frozen=True)
class _Scale:
    """Turns values into places of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, values_N: np.ndarray) -> np.ndarray:
        share = (values_N - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def draw(figure: Figure, axis: Axis) -> str:
    """The figure over `axis` as an `<svg>` element with a legend. Series without that axis are left out."""
    shown = [one for one in figure.series if axis.key in one.x]
    x = _Scale(*_x_range(shown, axis), LEFT, WIDTH - RIGHT)
    y = _Scale(*_y_range(figure, shown), HEIGHT - BOTTOM, TOP)
    legend, below = _legend(shown)
    clip = f"{figure.name}-{axis.key}-clip"
    inside = f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM + 2}"'
    parts = [
        f'<svg role="img" aria-label="{text(figure.title)}" viewBox="0 0 {WIDTH:g} {HEIGHT + below:g}">',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 1}" {inside}/></clipPath>',
        *_axes(figure, axis, x, y),
        f'<g clip-path="url(#{clip})">',
        *(part for one in sorted(shown, key=_order) for part in _drawn(one, axis, x, y)),
        "</g>",
        *(part for one in shown for part in _marks(one, axis, x, y)),
        legend,
        "</svg>",
    ]
    return "".join(parts)


def text(words: str) -> str:
    """`words` for a drawing or a page: markup is escaped, and invisible or directional characters are made visible."""
    return escape(visible(words))


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` round values (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Short labels that differ from each other: k, M, G, ... from ten thousand on."""
    largest = max(map(abs, values), default=0.0)
    power = int(math.log10(largest)) // 3 if largest >= 1e4 else 0
    if power > 6:
        return [f"{value:.3g}" for value in values]
    scaled = [value / 1000**power for value in values]
    gap = min((abs(b - a) for a, b in pairwise(scaled)), default=abs(scaled[0]) if scaled else 1.0)
    digits = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    if digits > 6:
        return [f"{value:.3g}" for value in values]
    return [f"{value:.{digits}f}{'kMGTPE'[power - 1] if power else ''}" for value in scaled]


def _x_range(shown: Sequence[Series], axis: Axis) -> tuple[float, float]:
    values = [one.x[axis.key] for one in shown if len(one.x[axis.key])]
    low = min((float(np.nanmin(one)) for one in values), default=0.0)
    high = max((float(np.nanmax(one)) for one in values), default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(figure: Figure, shown: Sequence[Series]) -> tuple[float, float]:
    if figure.y_range is not None:
        return figure.y_range
    parts = [values for one in shown for values in (one.y_N, one.low_N, one.high_N) if values is not None]
    values = np.concatenate([part[np.isfinite(part)] for part in parts]) if parts else np.zeros(0)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _axes(figure: Figure, axis: Axis, x: _Scale, y: _Scale) -> Iterator[str]:
    floor, wall = HEIGHT - BOTTOM, WIDTH - RIGHT
    across, up = ticks(x.low, x.high), ticks(y.low, y.high)
    across = [value for value in across if value == round(value)] if axis.whole else across
    for value, label in zip(across, tick_labels(across), strict=True):
        place = _number(x(np.array([value]))[0])
        yield f'<path class="grid" d="M{place} {TOP}V{floor}"/>'
        yield f'<text x="{place}" y="{floor + 13}" text-anchor="middle">{label}</text>'
    for value, label in zip(up, tick_labels(up), strict=True):
        place = _number(y(np.array([value]))[0])
        yield f'<path class="grid" d="M{LEFT} {place}H{wall}"/>'
        yield f'<text x="{LEFT - 5}" y="{place}" dy="3.5" text-anchor="end">{label}</text>'
    if figure.zero and y.low < 0 < y.high:
        yield f'<path class="axis" d="M{LEFT} {_number(y(np.zeros(1))[0])}H{wall}"/>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{wall}"/>'
    yield f'<text x="4" y="11">{text(figure.y_label)}</text>'
    yield f'<text x="{wall}" y="{floor + 27}" text-anchor="end">{text(axis.label)}</text>'


def _order(one: Series) -> tuple[int, int]:
    """Bands lie below faint lines, these below others; a full line lies below a dashed one."""
    return {"band": 0, "raw": 1, "mean": 2}.get(one.kind, 3), one.style.dash


def _drawn(one: Series, axis: Axis, x: _Scale, y: _Scale) -> Iterator[str]:
    color = one.style.color % len(LIGHT)
    x_N = x(one.x[axis.key])
    if one.low_N is not None and one.high_N is not None:
        yield f'<path class="band f{color}" d="{_outline(x_N, y(one.low_N), y(one.high_N))}"/>'
    if one.kind in ("raw", "line", "points", "mean"):
        faint = " raw" if one.kind == "raw" else f" {one.kind}"
        dash = "" if one.kind == "raw" else _dash(one)
        yield f'<path class="c s{color}{faint}"{dash} d="{_path(x_N, y(one.y_N))}"/>'


def _marks(one: Series, axis: Axis, x: _Scale, y: _Scale) -> Iterator[str]:
    """Markers of points, and marks of events; an event outside the y axis is marked at its edge."""
    color = one.style.color % len(LIGHT)
    places = zip(x(one.x[axis.key]).tolist(), y(one.y_N).tolist(), one.y_N.tolist(), strict=True)
    if one.kind in ("spike", "diverged"):
        for across, up, value in places:
            up = min(max(up, y.end), y.start) if math.isfinite(up) else y.end
            yield f"{_event(one.kind, color, across, up)[:-2]}><title>{text(one.name)}: {value:.4g}</title></path>"
    elif one.kind == "points":
        for across, up, _ in places:
            if math.isfinite(up) and y.end - 1 <= up <= y.start + 1:
                yield _marker(one.style.dash, color, across, up)


def _event(kind: str, color: int, across: float, up: float) -> str:
    if kind == "diverged":
        return f'<path class="mark s{color} lost" d="M{_number(across - 4)} {_number(up - 4)}l8 8m0 -8l-8 8"/>'
    return f'<path class="spike f{color}" d="M{_number(across - 3.5)} {_number(up - 9)}h7l-3.5 6z"/>'


def _marker(number: int, color: int, across: float, up: float) -> str:
    kind = MARKERS[number % len(MARKERS)]
    shape = {
        "circle": "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
        "square": "m-3 -3h6v6h-6z",
        "triangle": "m0 -3.6l3.4 6h-6.8z",
        "diamond": "m0 -4l3.5 4l-3.5 4l-3.5 -4z",
        "cross": "m-3 -3l6 6m0 -6l-6 6",
        "down": "m0 3.6l3.4 -6h-6.8z",
        "bar": "m0 -4v8",
        "plus": "m-3.5 0h7m-3.5 -3.5v7",
    }[kind]
    return f'<path class="mark s{color}" d="M{_number(across)} {_number(up)}{shape}"/>'


def _legend(shown: Sequence[Series]) -> tuple[str, float]:
    """The legend, below the plot, and its height. A name stands once, with the most telling of its series."""
    telling = {"points": 5, "line": 4, "mean": 3, "raw": 2, "band": 1, "spike": 0, "diverged": 0}
    best: dict[str, Series] = {}
    for one in shown:
        if one.name not in best or telling[one.kind] > telling[best[one.name].kind]:
            best[one.name] = one
    names = {name: _short(name) for name in best}
    longest = max(map(len, names.values()), default=0) * LETTER + 40
    columns = max(1, int((WIDTH - 8) // longest)) if longest else 1
    parts = []
    for number, (name, one) in enumerate(best.items()):
        left = 6 + number % columns * (WIDTH - 8) / columns
        middle = HEIGHT + 6 + number // columns * ROW
        parts.append(_sample(one, left, middle))
        parts.append(f'<text x="{_number(left + 31)}" y="{_number(middle + 3.5)}">{text(names[name])}</text>')
    return "".join(parts), math.ceil(len(best) / columns) * ROW + 4


def _sample(one: Series, left: float, middle: float) -> str:
    color = one.style.color % len(LIGHT)
    if one.kind in ("spike", "diverged"):
        return _event(one.kind, color, left + 13, middle + (6 if one.kind == "spike" else 0))
    if one.kind == "band":
        return f'<path class="band f{color}" d="M{_number(left)} {_number(middle - 5)}h26v10h-26z"/>'
    faint = " raw" if one.kind == "raw" else ""
    dash = "" if one.kind == "raw" else _dash(one)
    line = f'<path class="c s{color}{faint}"{dash} d="M{_number(left)} {_number(middle)}h26"/>'
    return line + (_marker(one.style.dash, color, left + 13, middle) if one.kind == "points" else "")


def _short(name: str) -> str:
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def _dash(one: Series) -> str:
    pattern = "1.5 2.5" if one.kind == "mean" else DASHES[one.style.dash % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _path(x_N: np.ndarray, y_N: np.ndarray) -> str:
    """The line through the finite points; a gap where one is missing. Far points are moved to where they are still out
    of sight.
    """
    parts, down = [], False
    for across, up in zip(x_N.tolist(), np.clip(y_N, -2000, 4000).tolist(), strict=True):
        if math.isfinite(up) and math.isfinite(across):
            parts.append(f"{'L' if down else 'M'}{_number(across)} {_number(up)}")
            down = True
        else:
            down = False
    return "".join(parts)


def _outline(x_N: np.ndarray, low_N: np.ndarray, high_N: np.ndarray) -> str:
    """The areas between two lines, one for each stretch of finite points."""
    finite = np.isfinite(x_N) & np.isfinite(low_N) & np.isfinite(high_N)
    cuts = np.flatnonzero(np.diff(finite.astype(int))) + 1
    found = []
    for part in np.split(np.arange(len(x_N)), cuts):
        if len(part) and finite[part[0]]:
            there = _path(x_N[part], high_N[part])
            back = _path(x_N[part][::-1], low_N[part][::-1])
            found.append(f"{there}L{back[1:]}Z")
    return "".join(found)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
