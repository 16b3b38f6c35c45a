"""Matrices as SVG heat-maps for a page, light or dark: the stronger a cell, the larger the number.

Positive numbers take the page's variable `--plus`, negative ones `--minus`. A matrix of more than `FEW` cells is a
picture inside the SVG, which would otherwise take megabytes.
"""

# R, C rows and columns

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

FEW = 400
"""Up to this many cells are drawn one by one, each with its value as a tooltip."""
PLUS, MINUS = (58, 128, 214), (224, 112, 44)
"""Colours of a picture, which a page cannot change: both show on white and on black."""


def heatmap(values_RC: np.ndarray, title: str, largest: float) -> str:
    """An `<svg>` element of one cell for each number, full at +-`largest`; numbers that are not finite are grey."""
    rows, columns = values_RC.shape
    share_RC = np.clip(np.divide(values_RC, largest) if largest > 0 else np.zeros_like(values_RC), -1.0, 1.0)
    cells = _cells(values_RC, share_RC) if rows * columns <= FEW else _picture(share_RC)
    return (
        f'<svg class="map" role="img" viewBox="0 0 {columns} {rows}" preserveAspectRatio="xMidYMid meet">'
        f"<title>{escape(title)}</title>{cells}</svg>"
    )


def largest_of(matrices: Sequence[np.ndarray]) -> float:
    """The largest size of the finite numbers of all `matrices`; 0 without any."""
    sizes = [np.abs(values_RC[np.isfinite(values_RC)]) for values_RC in matrices]
    return max((float(one.max(initial=0.0)) for one in sizes), default=0.0)


def spectra(series: list[tuple[str, tuple[float, ...]]]) -> str:
    """Lines of falling values from zero up, such as singular values, as an `<svg>` element: one for each name, the
    later the stronger.
    """
    drawn = [(name, values) for name, values in series if values]
    top = max((values[0] for _, values in drawn), default=0.0) or 1.0
    lines = []
    for number, (name, values) in enumerate(drawn, start=1):
        step = 100 / max(1, len(values) - 1)
        points = " ".join(f"{step * place:.2f},{50 - 48 * value / top:.2f}" for place, value in enumerate(values))
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="var(--plus)" stroke-width="1.2" '
            f'stroke-opacity="{0.25 + 0.75 * number / len(drawn):.2f}"><title>{escape(name)}</title></polyline>'
        )
    border = '<path d="M0 0V50H100" fill="none" stroke="var(--grid)" stroke-width=".6"/>'
    title = f"<title>largest {top:.3g}</title>"
    return f'<svg class="lines" role="img" viewBox="0 0 100 51">{title}{border}{"".join(lines)}</svg>'


def _cells(values_RC: np.ndarray, share_RC: np.ndarray) -> str:
    found = ['<rect width="100%" height="100%" fill="var(--card)"/>']
    for (row, column), value in np.ndenumerate(values_RC):
        share = share_RC[row, column]
        fill = "var(--grid)" if np.isnan(share) else "var(--plus)" if share >= 0 else "var(--minus)"
        opacity = 1.0 if np.isnan(share) else abs(share)
        found.append(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill="{fill}" fill-opacity="{opacity:.3f}">'
            f"<title>{row}, {column}: {value:.4g}</title></rect>"
        )
    return "".join(found)


def _picture(share_RC: np.ndarray) -> str:
    rows, columns = share_RC.shape
    url = f"data:image/png;base64,{base64.b64encode(png(share_RC)).decode()}"
    return f'<image width="{columns}" height="{rows}" style="image-rendering: pixelated" href="{url}"/>'


def png(share_RC: np.ndarray) -> bytes:
    """A PNG of -1 to 1, whose opacity is the size of a number and whose colour is its sign; grey where it is none."""
    rows, columns = share_RC.shape
    pixels = np.empty((rows, columns, 4), dtype=np.uint8)
    pixels[..., :3] = np.where((share_RC < 0)[..., None], MINUS, PLUS)
    pixels[..., 3] = np.round(255 * np.abs(np.nan_to_num(share_RC)))
    pixels[np.isnan(share_RC)] = (128, 128, 128, 255)
    # Each line of a PNG begins with the number of its filter; 0 is none.
    lines = np.concatenate((np.zeros((rows, 1), dtype=np.uint8), pixels.reshape(rows, -1)), axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*parts, strict=True)))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
