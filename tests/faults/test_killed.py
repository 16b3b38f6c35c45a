"""F1, F2: kill -9 between steps and at every stage of a save; the resumed run equals one that was never interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import pytest

from kha_train.checkpoint.writer import Stage

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

VARIANTS = ("gqa", "kha_mlp", "mea")
PAIRS = list(itertools.product(VARIANTS, (1, 2, 3)))
POINTS = ("step", *get_args(Stage), "before_prune", "mid_prune")


def faults_at(point: str, step: int) -> list[dict]:
    """Every rank dies at `point` of the save after `step`, or before the step after."""
    if point == "step":
        return [{"at": f"step:{step + 1}", "do": "kill_all"}]
    # Nothing is pruned before the second save after a start: the one resumed from stays.
    step += 2 * (point == "mid_prune")
    # Only a directory that lies under the final name already lets the writer come between two renames.
    obstacle = [{"at": f"save:{step}:before_rename", "do": "partial", "rank": 0}] if point == "between_renames" else []
    return [*obstacle, {"at": f"save:{step}:{point}", "do": "kill_all"}]


def killed_at(points: list[str], overrides: list[str], make_run: Callable, straight: Callable, ranks: int) -> None:
    """A run killed at each of `points` in turn, each attempt at a later save, against its undisturbed twin."""
    steps, overrides = 2 * (len(points) + 3), [*overrides, "checkpoint.keep_last=1"]
    twin, run = straight(*overrides, steps=steps, ranks=ranks), make_run(*overrides, steps=steps)
    for number, point in enumerate(points, start=1):
        codes = run.start(*faults_at(point, 2 * (number + 1)), ranks=ranks)
        assert codes == [-9] * ranks, (point, codes, run.log.read_text())
    run.to_the_end(ranks)
    assert run.curve() == twin.curve()
    assert len(run.curve()) == steps
    assert run.final_state() == twin.final_state()
    assert len(run.starts()) == len(points) + 1
    assert all(start >= 2 * number for number, start in enumerate(run.starts()))


@pytest.mark.parametrize(("variant", "zero"), PAIRS)
def test_a_run_killed_at_several_stages_of_a_save_equals_one_that_never_was(variant, zero, make_run, straight) -> None:
    """Over all cases every pair of point and variant, point and ZeRO stage, variant and ZeRO stage is met."""
    column = VARIANTS.index(variant)
    points = [point for row, point in enumerate(POINTS) if (row + column) % 3 == zero - 1]
    killed_at(points, [f"attention={variant}", f"engine=zero{zero}"], make_run, straight, ranks=2)


ALONE = {
    "accumulating": ["engine=zero2", "attention=kha_linear", "engine.micro_batch_size=2"],
    "bf16": ["engine=zero1", "attention=kha_mlp", "engine.precision=bf16"],
}


@pytest.mark.parametrize("case", [pytest.param("bf16", marks=pytest.mark.quick), "accumulating"])
def test_a_run_of_one_process_killed_between_steps_equals_one_that_never_was(case, make_run, straight) -> None:
    killed_at(["step", "step"], ALONE[case], make_run, straight, ranks=1)


@pytest.mark.soak
def test_two_ranks_that_share_experts_killed_amid_a_save_equal_a_run_that_never_was(make_run, straight) -> None:
    settings = ["attention=kha_mlp", "engine=zero2", "engine.expert_parallel=2"]
    killed_at(["mid_shard", "before_rename"], settings, make_run, straight, ranks=2)


@pytest.mark.soak
@pytest.mark.parametrize(("variant", "zero"), PAIRS)
def test_the_full_grid(variant, zero, make_run, straight) -> None:
    killed_at(list(POINTS), [f"attention={variant}", f"engine=zero{zero}"], make_run, straight, ranks=2)
