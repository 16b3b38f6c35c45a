"""Pictures of results: places of the drawing worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kha_train.analysis.study_collection import collected, pictures


def comparison(arm: str, mean: float, half: float | None) -> dict[str, Any]:
    interval = None if half is None else {"mean": mean, "low": mean - half, "high": mean + half}
    return {"arm": arm, "reference": "gqa", "measure": "train_loss", "differences": {"0": mean, "1": mean},
            "interval": interval, "better": 1, "worse": 1, "sign_test": 1.0, "sentence": "..."}  # fmt: skip


def write(folder: Path, study: str, comparisons: list[dict[str, Any]], **changed: Any) -> Path:
    measure = {"name": "train_loss", "kind": "train_loss", "larger_is_better": False, "tokens": 0.0}
    result = {
        "study": study, "scale": "cpu", "question": "Which?", "source": "a paper", "not_shown": "", "command": "kha",
        "began": 0.0, "ended": 1.0, "seconds": 1.0, "trials": 2, "study_sha256": "ab", "commits": [], "arms": {},
        "data_content_ids": [], "machines": [], "complete": True, "measures": [measure], "rates": "", "caveats": [],
        "comparisons": comparisons, "sentence": "so", "yardstick": "same",
    }  # fmt: skip
    file = folder / f"{study}-cpu.json"
    file.write_text(json.dumps(result | changed))
    return file


def across(svg: str, pattern: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, svg)]


def test_points_and_intervals_lie_on_one_scale_over_the_band_of_the_yardstick(tmp_path: Path) -> None:
    """From -0.25 to 0.15, and 5 % more on each side: 0.44 nats over 376 units behind the first 170."""
    files = [
        write(tmp_path, "position", [comparison("mlp_v", -0.2, 0.05), comparison("gate_v", 0.1, 0.05)]),
        write(tmp_path, "same", [comparison("same_function", 0.0, 0.01), comparison("other_data", 0.0, 0.04)]),
    ]
    drawn = pictures(tmp_path / "page.md", files)
    assert [place.relative_to(tmp_path).as_posix() for place in drawn] == ["pictures/position-cpu.svg"]
    (svg,) = drawn.values()
    ElementTree.fromstring(svg.encode())

    def place(value: float) -> float:
        return round(170 + (value + 0.27) / 0.44 * 376, 1)

    assert across(svg, r'class="f0" cx="([0-9.]+)"') == [place(-0.2), place(0.1)]
    assert across(svg, r'class="c s0" d="M([0-9.]+)') == [place(-0.25), place(0.05)]
    assert across(svg, r'class="band f7" d="M([0-9.]+)') == [place(-0.01)], "unpaired arms are not part of the band"
    assert across(svg, r'class="c s7" d="M([0-9.]+)') == [place(-0.01), place(-0.04)]
    assert "mlp_v - gqa" in svg and "grey: the study same" in svg and "over 2 seeds" in svg
    assert "![Paired differences of the study position with their intervals](pictures/position-cpu.svg)" in collected(
        tmp_path / "page.md", files
    )
    assert pictures(tmp_path / "page.md", files) == drawn, "equal results give equal bytes"


def test_an_arm_of_the_study_itself_may_be_the_yardstick(tmp_path: Path) -> None:
    file = write(tmp_path, "stability_rise", [comparison("same_function", 0.0, 0.02), comparison("mlp_v", 0.1, 0.1)])
    (svg,) = pictures(tmp_path / "page.md", [file]).values()
    assert "shaded: same_function" in svg and "grey" not in svg and 'class="band f7"' in svg


def test_an_arm_without_an_interval_keeps_its_row(tmp_path: Path) -> None:
    file = write(tmp_path, "position", [comparison("mlp_v", -0.2, 0.05), comparison("gate_v", float("inf"), None)])
    (svg,) = pictures(tmp_path / "page.md", [file]).values()
    assert "gate_v - gqa" in svg and "no interval: 1 better, 1 worse" in svg


def test_a_yardstick_of_another_size_is_not_drawn(tmp_path: Path) -> None:
    def arms(parameters: int) -> dict[str, Any]:
        size = {"parameters": parameters, "active_parameters": 1, "tokens": 100}
        rest: dict[str, Any] = {
            "stands_for": None,
            "rate": None,
            "rate_at_edge": None,
            "seeds": [],
            "means": {},
            "intervals": {},
        }
        return {"gqa": {"reference": None, "size": size, "values": {}, "diverged": 0} | rest}

    same = write(tmp_path, "same", [comparison("same_function", 0.0, 0.01)], arms=arms(100))
    for parameters, drawn in ((110, True), (200, False)):
        file = write(tmp_path, "position", [comparison("mlp_v", -0.2, 0.05)], arms=arms(parameters))
        (svg,) = pictures(tmp_path / "page.md", [file, same]).values()
        assert ("shaded" in svg) == drawn


def test_long_names_have_room(tmp_path: Path) -> None:
    file = write(tmp_path, "position", [comparison("an_arm_with_a_name_of_forty_letters_00000", -0.2, 0.05)])
    (svg,) = pictures(tmp_path / "page.md", [file]).values()
    (width,) = across(svg, r'viewBox="0 0 ([0-9.]+) ')
    assert width > 560


def test_without_an_interval_or_among_other_studies_there_is_no_picture(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "position", [comparison("mlp_v", 0.1, None)]),
        write(tmp_path, "gating", [comparison("gated", 0.1, 0.1)]),
    ]
    assert pictures(tmp_path / "page.md", files) == {}


def test_the_law_of_differences_stands_in_the_section_with_its_prediction(tmp_path: Path) -> None:
    one = {"mean": -0.01, "low": -0.02, "high": 0.0, "seeds": 5}
    cell = {"family": "dense", "parameters": 6_000_000, "tokens": 491520.0}
    law = {"formula": "b log2(N)", "middle_parameters": 2e6, "middle_tokens": 245760.0, "cells": 24,
           "coefficients": {"per doubling of tokens": one},
           "largest": [cell | {"predicted": one, "observed": one, "error": one}]}  # fmt: skip
    text = collected(tmp_path / "page.md", [write(tmp_path, "mine", [], difference_law=law)])
    assert "fitted to 24 cells around 2M active parameters, 246k tokens" in text
    assert "| per doubling of tokens | -0.01 [-0.02, +0] |" in text
    assert "| dense | 6M | 492k | -0.01 [-0.02, +0] | -0.01 [-0.02, +0] | -0.01 [-0.02, +0] |" in text
