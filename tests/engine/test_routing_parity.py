"""Auxiliary losses and the routing warm-up: the same step however the global batch is split over micro-batches, ranks
and ZeRO stages, with and without recomputation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("parity_worker.py")
STEPS = 4
FORMS = {
    "sequence": ["moe.auxiliary_loss.scope=sequence", "moe.auxiliary_loss.weight=0.1"],
    "previous_step": ["moe.auxiliary_loss.scope=previous_step", "moe.auxiliary_loss.weight=0.1"],
    "warm-up": ["moe.routing_warmup_steps=6", "moe.auxiliary_loss.weight=0.1", "moe.dense_layers=1"],
}
SPLITS = {
    "micro 4": ["engine.micro_batch_size=4"],
    "micro 1": ["engine.micro_batch_size=1"],
    "micro 2 recomputed": ["engine.micro_batch_size=2", "engine.activation_checkpointing=full"],
    "micro 2 zero 3": ["engine.micro_batch_size=2", "engine.zero_stage=3", "engine.activation_checkpointing=full"],
}


@pytest.fixture(scope="module")
def answers(small: list[str], padded: list[str], run_ranks: Callable[..., list[Any]]) -> dict[int, dict[str, Any]]:
    """World size -> "form, split" -> what rank 0 answered."""
    common = [*small, "optim.lr=3e-3", "moe.z_loss_weight=0.01", "moe.dense_width=64"]
    cases = {
        f"{form}, {split}": ([*common, *overrides, *changes], STEPS)
        for form, overrides in FORMS.items()
        for split, changes in SPLITS.items()
    }
    for split, changes in SPLITS.items():
        cases[f"padding, {split}"] = ([*padded, *common[len(small) :], *FORMS["sequence"], *changes], STEPS)
    plain = [*small, "optim.lr=3e-3", "engine.micro_batch_size=4"]
    cases["no auxiliary loss, micro 4"] = (plain, STEPS)
    return {ranks: run_ranks(WORKER, ranks, cases=cases)[0] for ranks in (1, 2)}


@pytest.mark.parametrize("form", [*FORMS, "padding"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_losses_norms_and_loads_do_not_depend_on_the_split(
    form: str, ranks: int, split: str, answers: dict[int, dict[str, Any]]
) -> None:
    expected, found = answers[1][f"{form}, micro 4"], answers[ranks][f"{form}, {split}"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=5e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)
    for step in range(STEPS):
        assert found["auxiliary"][step] == pytest.approx(expected["auxiliary"][step], rel=1e-5)
    # A choice between two equal scores may fall either way when sums are rounded differently.
    for found_E, expected_E in zip(chain(*found["load"]), chain(*expected["load"]), strict=True):
        assert sum(abs(a - b) for a, b in zip(found_E, expected_E, strict=True)) <= 0.01 * sum(expected_E)


@pytest.mark.parametrize("form", FORMS)
def test_the_auxiliary_losses_are_on_and_change_the_gradient_but_not_the_reported_loss(
    form: str, answers: dict[int, dict[str, Any]]
) -> None:
    with_losses, without = answers[1][f"{form}, micro 4"], answers[1]["no auxiliary loss, micro 4"]
    assert without["auxiliary"] == [[0.0, 0.0]] * STEPS
    assert all(balance > 0.5 and z > 0 for balance, z in with_losses["auxiliary"])
    assert with_losses["norm"][1:] != pytest.approx(without["norm"][1:], rel=1e-4)
    if form != "warm-up":
        assert with_losses["loss"][0] == pytest.approx(without["loss"][0], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loads_count_every_token_of_all_ranks_and_no_padding(ranks: int, answers: dict[int, dict[str, Any]]) -> None:
    """Two layers choose two experts for each token; rows hold 40, 60, 33 or 64 of 64 places."""
    for split in SPLITS:
        found = answers[ranks][f"padding, {split}"]
        for step in range(STEPS):
            assert {sum(load_E) for load_E in found["load"][step]} == {2 * found["tokens"][step]}
        assert found["tokens"] == answers[1]["padding, micro 4"]["tokens"]
        assert all(8 * 33 < tokens < 8 * 64 for tokens in found["tokens"])
