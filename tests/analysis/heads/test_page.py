"""The page of `kha analyze`, its heat-maps and its table."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from kha_train.analysis.heads.inspection import (
    AttentionWeights,
    Clusters,
    Gate,
    HeadOutputs,
    Inspection,
    LayerInspection,
    LearnedMatrix,
    ProbeRows,
    mean_off_diagonal,
)
from kha_train.analysis.heads.page import page_html, spread, write_page
from kha_train.analysis.heads.table import layer_row, print_inspections
from kha_train.analysis.heatmap import MINUS, PLUS, heatmap, png, spectra
from kha_train.errors import ConfigError
from kha_train.telemetry.terminal import LiteralConsole

EYE = ((1.0, 0.25), (0.25, 1.0))
OUTPUTS = HeadOutputs(8, EYE, EYE, ((1.0, 0.5), (0.5, 1.0)), EYE, 1.9, 1.8, (3.0, 5.0))
WEIGHTS = AttentionWeights((0.5, 0.7), (3.0, 5.0), (0.125, 0.375), (0.25, 0.75), 0.5)
UP = LearnedMatrix(
    "interaction.maps.v.up", "within", 1.0, 3.0, 1.1, 0.9, 0.3, 0.02, (1.2, 0.9), [[1.2, 0.1], [0.0, 1.0]]
)
GATE = LearnedMatrix("interaction.maps.v.gate", "within", 0.0, 4.0, 0.0, None, None, 0.0, (), [[math.nan] * 2] * 2)


def result(step: int, **changes: object) -> Inspection:
    gates, clusters = (
        (Gate("interaction.maps.v", 0.5625, 0.1, (0.5, 0.625)),),
        (Clusters("<b>", (0, 1), 0.2, 0.4, 0.1, 1.0),),
    )
    layers = tuple(
        LayerInspection(number, OUTPUTS, WEIGHTS, (0.02, -0.0625), gates, (UP, GATE), clusters) for number in range(2)
    )
    probe = ProbeRows("data.validation", "content", "digest", 4, 256, 9, 247)
    found = Inspection(1, step, "0" * 64, "kha_train", "gqa", "knocking_mlp", 2, 1, probe, 4.5, layers, {"rise": "<i>"})
    return replace(found, **changes)


class Reader(HTMLParser):
    """Checks that every element is closed in order, and collects addresses and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_by_itself_and_shows_foreign_names_as_text() -> None:
    page = Reader(page_html("<script>run", [result(100), result(200)], "kha-analyze mark"))
    assert page.open == [] and page.tags.isdisjoint({"script", "link", "img", "b", "i"})
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    for words in ("<script>run", "step 200", "256 tokens", "No rise: <i>", "Over training", "0.562", "-0.0625", "<b>"):
        assert words in page.text, words
    alone = Reader(page_html("run", [result(200)], "mark"))
    assert "Over training" not in alone.text
    other_rows = result(100, probe=replace(result(100).probe, digest="other"))
    assert "Over training" not in Reader(page_html("run", [other_rows, result(200)], "mark")).text


def test_what_a_variant_lacks_is_left_out_of_the_page_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    layer = LayerInspection(0, OUTPUTS, None, None, (), (), ())
    bare = result(5, layers=(layer, replace(layer, layer=1)), absent={"weights": "linear has none"})
    page = Reader(page_html("run", [bare, replace(bare, step=6)], "mark")).text
    assert (
        "entropy" not in page
        and "Learned" not in page
        and "Gates" not in page
        and "No weights: linear has none" in page
    )
    print_inspections("run", bare, [bare], LiteralConsole(width=100))
    printed = capsys.readouterr().out
    assert "entr" not in printed and "CKA" in printed and "no weights: linear has none" in printed


def test_a_row_is_of_means_over_heads_and_pairs() -> None:
    row = layer_row(result(5).layers[1])
    expected = {
        "layer": 1, "cosine": 0.25, "cka": 0.5, "head_rank": 4.0, "entropy": 0.6, "distance": 4.0, "sink": 0.25,
        "diversity": 0.5, "gate": 0.5625, "matrix_distance": 5.0, "rise_mean": -0.02125, "rise_largest": 0.02,
        "rise_head": 0,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert mean_off_diagonal([[1.0, 0.2, 0.4], [0.6, 1.0, 0.1], [0.3, 0.5, 1.0]]) == pytest.approx(2.1 / 6)
    assert math.isnan(mean_off_diagonal([[1.0]]))


def test_only_a_page_of_this_command_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "analysis").mkdir()
    page = write_page(tmp_path, "run", [result(1)])
    assert page == tmp_path / "analysis" / "index.html" and "step 1" in page.read_text()
    assert write_page(tmp_path, "run", [result(2)]) == page and "step 2" in page.read_text()
    page.write_text("<!doctype html> mine")
    with pytest.raises(ConfigError, match=r"index\.html"):
        write_page(tmp_path, "run", [result(3)])
    assert page.read_text() == "<!doctype html> mine"


def test_a_small_map_has_a_cell_with_its_value_for_each_number() -> None:
    drawing = xml.fromstring(heatmap(np.array([[0.5, -1.0, math.nan]]), "a < b", 2.0))
    cells = [rect for rect in drawing.findall("rect") if "x" in rect.attrib]
    assert [(cell.get("fill"), float(cell.get("fill-opacity"))) for cell in cells] == [
        ("var(--plus)", 0.25), ("var(--minus)", 0.5), ("var(--grid)", 1.0),
    ]  # fmt: skip
    assert [cell.findtext("title") for cell in cells] == ["0, 0: 0.5", "0, 1: -1", "0, 2: nan"]
    assert drawing.findtext("title") == "a < b" and drawing.get("viewBox") == "0 0 3 1"
    nothing = xml.fromstring(heatmap(np.zeros((2, 2)), "zeros", 0.0))
    assert {float(cell.get("fill-opacity")) for cell in nothing.findall("rect") if "x" in cell.attrib} == {0.0}


def test_a_large_map_is_a_picture_that_others_read() -> None:
    shares = np.linspace(-1.0, 1.0, 30 * 20).reshape(30, 20)
    shares[3, 4] = math.nan
    pixels = (matplotlib.image.imread(io.BytesIO(png(shares)), format="png") * 255).round().astype(int)
    assert pixels.shape == (30, 20, 4)
    assert np.array_equal(pixels[..., 3] * ~np.isnan(shares), np.round(255 * np.abs(np.nan_to_num(shares))))
    assert tuple(pixels[0, 0, :3]) == MINUS and tuple(pixels[-1, -1, :3]) == PLUS
    assert pixels[3, 4].tolist() == [128, 128, 128, 255]
    drawing = xml.fromstring(heatmap(shares, "large", 1.0))
    assert drawing.find("image").get("href").startswith("data:image/png;base64,") and drawing.find("rect") is None


def test_spectra_fall_from_the_largest_value_of_all() -> None:
    drawing = xml.fromstring(spectra([("first", (2.0, 1.0, 0.0)), ("none", ()), ("last", (1.0, 1.0, 1.0))]))
    lines = {line.findtext("title"): line.get("points") for line in drawing.findall("polyline")}
    assert lines == {"first": "0.00,2.00 50.00,26.00 100.00,50.00", "last": "0.00,26.00 50.00,26.00 100.00,26.00"}
    assert re.search("largest 2", drawing.findtext("title"))


def test_of_many_checkpoints_the_first_and_the_last_are_shown() -> None:
    saved = [result(step) for step in range(0, 1000, 100)]
    assert [one.step for one in spread(saved, 4)] == [0, 300, 600, 900]
    assert spread(saved, 10) == saved and [one.step for one in spread(saved, 3)] == [0, 400, 900]
