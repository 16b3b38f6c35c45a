"""The table of recipes in CONTRIBUTING.md is the page's own list: nothing is missing, and its figures are true."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (an? [a-z ]+) \| (\d+)[^|]* \| `(tests/recipes/[a-z_]+\.py)` \|$", re.MULTILINE)
MOST = {
    "an attention variant": 3,
    "a metric": 1,
    "an optimiser": 3,
    "an engine": 1,
    "an evaluation task": 2,
    "a telemetry sink": 1,
}
"""Files that each may touch at most; what an engine touches is one new package."""


def test_every_recipe_has_a_row_with_its_number_of_files_and_a_test(recipes: dict[str, Any]) -> None:
    rows = {added: (int(count), test) for added, count, test in ROW.findall((ROOT / "CONTRIBUTING.md").read_text())}
    assert {added for added, blocks in recipes.items() if any("file" in block.options for block in blocks)} == {*rows}
    for added, (count, test) in rows.items():
        assert count <= MOST[added], added
        assert f'follow("{added}")' in (ROOT / test).read_text(), f"{test} follows the recipe of {added}"
        files = {block.options["file"] for block in recipes[added] if "file" in block.options}
        assert added == "an engine" or len(files) == count, added


HOUSE = ("house_rules", "imports", "circles", "engine_fence", "everything_is_used", "types")


@pytest.mark.slow
def test_the_code_of_the_page_is_formatted_and_typed_and_keeps_the_rules_of_the_house(
    recipes: dict[str, Any], follow: Callable[..., Any]
) -> None:
    """All recipes in one copy: what a contributor writes after them lands as it is."""
    tree = follow(*recipes)
    python = (sys.executable, "-m")
    tree.run(*python, "ruff", "check", ".")
    tree.run(*python, "ruff", "format", "--check", ".")
    tree.run(*python, "mypy")
    rules = [f"tests/architecture/test_{name}.py" for name in HOUSE]
    tree.run(*python, "pytest", "-q", "-p", "no:cacheprovider", *rules)
