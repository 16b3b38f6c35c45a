"""The picture of the README is made of two figures of a report, as they are."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from tools.readme_picture import FIGURES, HEIGHT, TITLE, WIDTH, side_by_side

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def test_figures_stand_side_by_side_and_keep_what_they_draw() -> None:
    figure = '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><g/></svg>'
    picture = ElementTree.fromstring(side_by_side([(figure, "one"), (figure, "two")]))
    inner = picture.findall(f"{SVG}svg")
    assert picture.get("viewBox") == f"0 0 {2 * WIDTH} {HEIGHT + TITLE}"
    assert [one.get("x") for one in inner] == ["0", str(WIDTH)] and all(
        one.find(f"{SVG}g") is not None for one in inner
    )
    assert [one.text for one in picture.findall(f"{SVG}text")] == ["one", "two"]


def test_the_picture_in_the_tree_has_both_figures_and_no_name_twice() -> None:
    picture = ElementTree.parse(ROOT / "docs/images/quickstart.svg").getroot()
    assert [one.text for one in picture.findall(f"{SVG}text")] == [title for _, title in FIGURES]
    names = [one.get("id") for one in picture.iter() if one.get("id")]
    assert len(names) == len({*names}) >= 2
