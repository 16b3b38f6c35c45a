"""The recipe of an engine: one new package, which `engine.name` selects and the contract's tests find by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.record import read_metrics

PACKAGE = Path("kha_train/engine/twice")


@pytest.mark.slow
def test_a_new_package_is_an_engine_that_keeps_the_contract_and_trains_a_run(
    follow: Callable[[str], Any], small: list[str], tmp_path: Path, curve: Callable[[Path], list[dict[str, Any]]]
) -> None:
    recipe = follow("an engine")
    touched = [Path(path) for path in recipe.touched()]
    assert touched and all(path.is_relative_to(PACKAGE) for path in touched)
    assert "5 passed" in recipe.type_commands(), "each promise was asked of the new engine"
    settings = [*small, "engine.device=cpu", "engine.micro_batch_size=2", "data.global_batch_size=4", "run.steps=4"]
    for name in ("twice", "plain"):
        recipe.run("kha", "train", *settings, f"engine.name={name}", f"run.dir={tmp_path / name}")
    assert curve(tmp_path / "twice") == curve(tmp_path / "plain")
    refused = recipe.run("kha", "train", *settings, "engine.name=thrice", f"run.dir={tmp_path / 'no'}", code=2)
    assert "twice" in refused


@pytest.mark.slow
def test_what_the_engine_is_for_ends_a_run_that_computes_wrong(
    follow: Callable[[str], Any], small: list[str], tmp_path: Path
) -> None:
    """The copy's second forward is made to differ in the last bit from the third step on."""
    recipe = follow("an engine")
    module = recipe.tree / PACKAGE / "__init__.py"
    honest = module.read_text()
    wrong = honest.replace(
        "output.loss_sum.detach()", "output.loss_sum.detach() * (1 + 2e-7 * (self.optimizer_steps > 1))"
    )
    assert wrong != honest
    module.write_text(wrong)
    settings = [*small, "engine.device=cpu", "engine.micro_batch_size=2", "run.steps=4", "engine.name=twice"]
    printed = recipe.run("kha", "train", *settings, f"run.dir={tmp_path / 'run'}", code=75)
    assert "one micro-batch has two losses" in printed
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
