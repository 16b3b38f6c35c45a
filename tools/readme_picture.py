"""Makes the picture of the README: two figures of the quickstart's report, side by side.

kha quickstart && python tools/readme_picture.py quickstart/report docs/images/quickstart.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FIGURES = (("loss-steps", "Train loss of both runs"), ("difference-steps", "Difference of the same two runs"))
WIDTH, HEIGHT, TITLE = 400, 245, 24
"""Sizes of a figure, and of the line above it."""


def side_by_side(figures: list[tuple[str, str]]) -> str:
    """One SVG of several: pairs of an SVG of `kha compare` and its title."""
    parts = []
    for number, (figure, title) in enumerate(figures):
        at = number * WIDTH
        inner = re.sub(r"^<\?xml.*?\?>|<!--.*?-->", "", figure, flags=re.DOTALL).strip()
        placed = inner.replace("<svg ", f'<svg x="{at}" y="{TITLE}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        style = "font: 600 12px system-ui, sans-serif"
        parts.append(f'<text x="{at + 4}" y="{TITLE - 8}" style="{style}">{title}</text>{placed}')
    box = f"0 0 {WIDTH * len(figures)} {HEIGHT + TITLE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="{box}">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main(report: Path, out: Path) -> None:
    """Write the picture of a `report` directory to the file `out`."""
    figures = [((report / "figures" / f"{name}.svg").read_text(encoding="utf-8"), title) for name, title in FIGURES]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(side_by_side(figures), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
