"""The recipe of an attention variant: three files, and the contract suite finds and judges what they add."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

SUITE = (sys.executable, "-m", "pytest", "tests/contract/test_contract.py", "-q", "-p", "no:cacheprovider", "-rf")
MODULE = "kha_train/model/attention/temper.py"


@pytest.mark.slow
def test_three_files_make_a_variant_that_keeps_the_contract(follow: Callable[[str], Any]) -> None:
    """On one base, as the page says; the next test has the others."""
    recipe = follow("an attention variant")
    assert recipe.touched() == ["configs/interaction/temper.yaml", MODULE, "kha_train/variants/registry.py"]
    printed = recipe.type_commands()
    passed = int(printed.partition(" passed")[0].split()[-1])
    assert passed >= 10 and "failed" not in printed, printed
    # `kha plan` counts what the options say of the preset `tiny`: a gain for each of 2 key/value heads in 4 layers.
    planned = recipe.run("kha", "plan", "interaction@attention.interaction=temper", "--json")
    assert json.loads(planned)["params"]["by_component"]["interaction"] == 2 * 4


@pytest.mark.slow
def test_every_base_takes_the_variant(follow: Callable[[str], Any]) -> None:
    recipe = follow("an attention variant")
    printed = recipe.run(*SUITE, "-k", "temper", "-m", "not slow")
    assert int(printed.rpartition(" passed")[0].split()[-1]) >= 50


@pytest.mark.slow
def test_a_variant_that_lets_tokens_see_later_ones_and_miscounts_is_found_out(follow: Callable[[str], Any]) -> None:
    recipe = follow("an attention variant")
    module = recipe.tree / MODULE
    honest = module.read_text()
    cheating = honest.replace("v_BTGW * self", "v_BTGW.flip(1) * self").replace(
        "return heads.kv_heads\n", "return heads.kv_heads + 1\n"
    )
    assert cheating != honest
    module.write_text(cheating)
    printed = recipe.run(*SUITE, "-k", "temper", "-m", "not slow", code=1)
    for promise in ("no_token_sees_a_later_one", "parameters_and_operations", "decoding_with_a_cache"):
        assert f"test_{promise}" in printed, printed
