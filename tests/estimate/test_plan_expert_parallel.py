"""What `kha plan` says of experts that ranks share: memory, traffic, and the number to take."""

from __future__ import annotations

import pytest

from kha_train import compose
from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import count_parameters, held_parameters
from kha_train.estimate.exchange import exchange_bytes
from kha_train.estimate.memory import GIB, activation_bytes, plan_memory
from kha_train.estimate.plan import make_plan
from kha_train.estimate.remedies import possible_changes, savings

EXPERTS, TOTAL = 28_991_029_248, 30_532_122_624
"""Of Qwen3-30B-A3B: 48 layers x 128 experts x 3 matrices of 2048 x 768; and all of its parameters."""


def thirty_billion(*more: str) -> RunConfig:
    """Qwen3-30B-A3B in bf16 on 8 H100."""
    plain = ["model=qwen3_30b", "attention=gqa", "cluster=h100_1x8", "engine=zero2", "engine.micro_batch_size=1"]
    return compose([*plain, "data.global_batch_size=8", *more])


def test_a_rank_holds_its_part_of_the_experts_and_all_else() -> None:
    whole, shared = thirty_billion(), thirty_billion("engine.expert_parallel=8")
    assert count_parameters(whole).by_component["experts"] == EXPERTS
    assert sum(held_parameters(whole)) == count_parameters(whole).total == pytest.approx(TOTAL, rel=1e-3)
    assert held_parameters(shared) == (count_parameters(whole).total - EXPERTS, EXPERTS // 8)
    before, after = plan_memory(whole).terms, plan_memory(shared).terms
    assert before["parameters"] - after["parameters"] == 2 * EXPERTS * 7 // 8
    # Every rank owns an eighth of masters and moments either way.
    assert before["optimizer"] == after["optimizer"]
    # Eight rows of 2048 numbers in bf16 arrive for each token of each layer, and stay.
    tokens = whole.model.seq_len
    assert activation_bytes(shared) - activation_bytes(whole) == tokens * 48 * 8 * 2048 * 2


def test_gradients_of_experts_travel_among_the_ranks_that_hold_the_same_ones() -> None:
    """16 ranks, EP 8: two hold the same experts, and each sends half of its eighth."""
    config = thirty_billion(
        *("cluster.devices=16", "engine=zero1", "engine.micro_batch_size=1", "engine.expert_parallel=8"),
        "data.global_batch_size=16",
    )
    everywhere = count_parameters(config).total - EXPERTS
    once = 2 * everywhere * 15 // 16 + 2 * (EXPERTS // 8) // 2
    volume = make_plan(config).communication[0]
    assert volume.bytes_per_step == 2 * once + volume.exchange_bytes_per_step
    # 7 of 8 copies leave: 8 copies of a token, 4 times a row of 2048 bf16 numbers, 2 times an fp32 weight.
    assert volume.exchange_bytes_per_step == 48 * config.model.seq_len * 8 * (4 * 2048 * 2 + 2 * 4) * 7 // 8
    assert exchange_bytes(thirty_billion()) == 0


def test_the_lowest_number_that_fits_is_advised() -> None:
    """A budget between what 2 and 4 ranks that share the experts need."""
    needs = {n: plan_memory(thirty_billion(f"engine.expert_parallel={n}")).total / GIB for n in (1, 2, 4, 8)}
    assert needs[1] > needs[2] > needs[4] > needs[8]
    memory = (needs[2] + needs[4]) / 2
    plan = make_plan(thirty_billion(f"cluster.memory_gib={memory}", "cluster.reserved_gib=0"))
    offered = [remedy for remedy in plan.remedies if "expert_parallel" in remedy.overrides]
    assert [(remedy.overrides, remedy.fits) for remedy in offered] == [("engine.expert_parallel=4", True)]
    assert plan.together == "engine.expert_parallel=4"
    assert plan.to_dict()["memory_per_rank"]["by_stage"]["3"] == plan_memory(thirty_billion("engine=zero3")).total


def test_only_numbers_that_divide_are_offered() -> None:
    config = thirty_billion("engine.expert_parallel=4", "cluster.devices=12", "data.global_batch_size=12")
    offered = [change.override for change in possible_changes(config) if "expert_parallel" in change.override]
    assert offered == [f"engine.expert_parallel={n}" for n in (8, 16, 32, 64, 128)]
    plan = make_plan(compose(["model=qwen3_30b", "cluster=h100_1x8", "cluster.devices=6", "data.global_batch_size=6"]))
    assert "engine.expert_parallel=8" not in {remedy.overrides for remedy in plan.remedies}
    compiled = possible_changes(thirty_billion("engine.compile=block"))
    assert not [change for change in compiled if "expert_parallel" in change.override]


@pytest.mark.parametrize(("cluster", "offered"), [("h100_8x8", 8), ("unspecified", 2)])
def test_one_number_of_ranks_is_offered_to_a_run_that_lacks_memory(cluster: str, offered: int) -> None:
    """A message has room for three settings, and every divisor would save; those of other nodes cost most. A cluster
    that nobody described has nodes of one device."""
    config = thirty_billion(f"cluster={cluster}", "cluster.devices=64", "data.global_batch_size=64")
    overrides = [override for override, _ in savings(config)]
    assert [one for one in overrides if "expert_parallel" in one] == [f"engine.expert_parallel={offered}"]
    assert "engine.zero_stage=3" in overrides
