"""The page of costs is made by its command, and agrees with what the papers print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kha_train.config.compose import shipped
from kha_train.operate.cost_page import cost_page, paper_shares, variant_costs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost.md"
COMMAND = "kha plan --variants "


def given() -> list[str]:
    """The settings of the command on the page."""
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(COMMAND))
    return shlex.split(line.removeprefix(COMMAND))


def test_the_page_is_what_its_command_prints_with_every_preset_on_it() -> None:
    """After a change: the command on docs/cost.md, `> docs/cost.md`."""
    costs = variant_costs(given())
    assert cost_page(given(), costs) == PAGE.read_text()
    assert {one.name for one in costs} == {file.stem for file in (shipped("configs") / "attention").glob("*.yaml")}


def test_the_papers_formulas_give_its_printed_shares() -> None:
    """KHA section 3.4: 0.55 % of a layer and 1.17 % of attention at L 2048, d 1024, n 32."""
    assert paper_shares(2048, 1024, 32) == pytest.approx((0.55, 1.17), abs=0.005)


def test_the_share_at_our_shape_is_the_count_by_hand() -> None:
    """Per token and layer at 8,192 tokens: KHA-MLP does 6 x 4 x 128^2 operations. Projections do 2 x 18,874,368, scores
    2 x 2 x 32 x 128 x 4096, the router 2 x 262,144, and eight experts 8 x 2 x 2,359,296.
    """
    layer = 2 * 18_874_368 + 4 * 32 * 128 * 4096 + 2 * 262_144 + 8 * 2 * 2_359_296
    share = 100 * 6 * 4 * 128**2 / layer
    assert share == pytest.approx(0.275, abs=5e-4)
    (printed,) = re.findall(r"KHA-MLP of a layer, this shape \| - \| ([0-9.]+) %", PAGE.read_text())
    # Half of a row of 8,192 tokens is 4,096.5, the token itself included.
    assert float(printed) == pytest.approx(share, abs=1e-3)
