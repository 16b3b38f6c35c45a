"""Contributed figures of a GPU go into docs/performance.md, and only those of kernels that passed their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import markdown
import pytest

from kha_train.errors import DataError
from tools import fold_gpu_results as tool

FIGURES = {
    "seconds": 0.25,
    "against_base": {"ratio": 1.0, "low": 1.0, "high": 1.0},
    "tokens_per_second": 32768.0,
    "mfu": 0.301,
    "mfu_documents": 0.25,
    "mfu_palm": 0.4,
    "peak_gib": 61.5,
    "block_seconds": [0.25] * 15,
}


def made(folder: Path, **changed: Any) -> Path:
    """A file as `kha bench gpu` leaves it, with some of its fields changed."""
    environment = {
        "date": "2026-12-24T10:00:00+00:00",
        "device": {"name": "NVIDIA H200"},
        "threads": 16,
        "load": 0.5,
        "versions": {"torch": "2.11.0"},
        "git": {"commit": "0123456789abcdef"},
        "command": "kha bench gpu",
    }
    stages = {
        "tests": {"command": "pytest tests", "seconds": 90.0, "summary": "55 passed"},
        "step": {"command": "step", "seconds": 60.0, "answer": {"given": {"arms": {"attention=gqa": FIGURES}}}},
    }
    path = folder / "results.json"
    path.write_text(json.dumps({"rehearsal": False, "environment": environment, "stages": stages} | changed))
    return path


PAGE = "# Page\n\nbefore\n{0}\n{2}{1}\nafter\n"


def test_a_contribution_is_added_once_and_replaced_when_it_comes_again(tmp_path: Path) -> None:
    empty = PAGE.format(tool.BEGIN, tool.END, tool.NONE)
    once = tool.fold(empty, [tool.read(made(tmp_path))])
    assert once.startswith("# Page\n\nbefore\n") and once.endswith("\nafter\n") and "unproven**" not in once
    assert "### NVIDIA H200, 2026-12-24" in once and "| step | `attention=gqa` | 250.0 |" in once and "30.1 %" in once
    assert tool.fold(once, [tool.read(made(tmp_path))]) == once
    assert tool.fold(empty, []) == empty


def test_what_proves_nothing_is_refused(tmp_path: Path) -> None:
    passed = {"command": "pytest tests", "seconds": 1.0, "summary": "5 passed"}
    for problem, changed in (
        ("rehearsal", {"rehearsal": True}),
        ("failed: tests", {"stages": {"tests": passed | {"error": "1 failed"}}}),
        ("no tests", {"stages": {"step": {"command": "step", "seconds": 1.0}}}),
        ("missing", {"environment": {"date": "2026-12-24"}}),
        ("missing", {"stages": {"tests": {"seconds": 1.0, "summary": "5 passed"}}}),
    ):
        with pytest.raises(DataError, match=problem):
            tool.read(made(tmp_path, **changed))
    with pytest.raises(DataError, match="no such file"):
        tool.read(tmp_path / "none.json")


def test_a_device_s_name_cannot_break_the_page(tmp_path: Path) -> None:
    found = tool.read(made(tmp_path))
    found["environment"]["device"]["name"] = "H200\n## Forged\x1b[31m"
    page = tool.fold(PAGE.format(tool.BEGIN, tool.END, tool.NONE), [found])
    assert "\n## Forged" not in page and "\x1b" not in page


def test_html_and_links_of_a_contribution_are_text_on_the_site(tmp_path: Path) -> None:
    found = tool.read(made(tmp_path))
    found["environment"]["device"]["name"] = f"<script>1</script>{tool.END}"
    summary = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) [b]\n\n[b]: javascript:alert(1)"
    found["stages"]["tests"]["summary"] = summary
    page = tool.fold(PAGE.format(tool.BEGIN, tool.END, tool.NONE), [found])
    assert "<script" not in page and "<img" not in page and page.count(tool.END) == 1
    assert "href" not in markdown.markdown(page)
    assert tool.fold(page, [found]) == page


def test_the_page_of_the_project_has_the_section() -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.fold(page, []) == page
