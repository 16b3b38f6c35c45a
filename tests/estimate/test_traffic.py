"""Planned traffic against the bytes of the collectives that a real step calls, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train import compose
from kha_train.estimate.counts import count_parameters
from kha_train.estimate.plan import make_plan

WORKER = Path(__file__).with_name("traffic_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_planned_traffic_is_that_of_the_collectives_of_a_step(
    stage: int, precision: str, run_ranks: Callable[..., list[Any]]
) -> None:
    """Two micro-batches of a second step: in the first one DeepSpeed learns what ZeRO 3 may keep gathered. It keeps
    small parameters too, so it gathers less than planned. Gradients and weights are messages on gloo."""
    overrides = [
        *("model=tiny", "cluster=cpu", "cluster.devices=2", "engine.micro_batch_size=1", "data.global_batch_size=4"),
        *(f"engine=zero{stage}", f"engine.precision={precision}"),
    ]
    config = compose(overrides)
    planned = make_plan(config).communication[stage - 1].bytes_per_step
    sent = run_ranks(WORKER, 2, fresh=True, overrides=overrides, steps=2)[0][1]["all"]
    print(f"ZeRO {stage} {precision}: planned {planned}, sent {sent}")
    if stage < 3:
        assert sum(sent.values()) == pytest.approx(planned, rel=0.01)
        assert "reduce_scatter_tensor" not in sent and sent.get("all_reduce", 0) < 1000
        return
    once = 4 * count_parameters(config).total // 2
    assert sent["ordered_reduce_scatter"] == pytest.approx(2 * once, rel=0.01)
    assert once < sent["all_gather"] <= 2.02 * once and sum(sent.values()) <= planned * 1.01


@pytest.mark.slow
def test_with_groups_of_ranks_all_gathers_but_a_steps_first_are_inside_them(
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Two groups of two ranks, two micro-batches. Building the engine deals the weights out once, so the first step
    needs no gather among all. In the second DeepSpeed knows the layers' order, and keeps a small model gathered."""
    overrides = [
        *("model=tiny", "cluster=cpu", "cluster.devices=4", "engine.micro_batch_size=1", "data.global_batch_size=8"),
        *("engine=zero3", "engine.hpz_partition_size=2", "engine.precision=fp32"),
    ]
    config = compose(overrides)
    planned = make_plan(config).communication[2]
    first, second = run_ranks(WORKER, 4, fresh=True, overrides=overrides, steps=2)[0]
    print(f"groups: planned {planned}, sent {first}, then {second}")
    once, once_in_a_group = 4 * count_parameters(config).total * 3 // 4, 4 * count_parameters(config).total // 2
    assert planned.group_bytes_per_step == once_in_a_group
    assert planned.bytes_per_step == once_in_a_group + 3 * once
    assert first["groups"]["all_gather"] == pytest.approx(3 * once_in_a_group, rel=0.01)
    assert second["all"]["all_gather"] == pytest.approx(once, rel=0.01)
    for step in (first, second):
        assert step["all"]["ordered_reduce_scatter"] == pytest.approx(2 * once, rel=0.01)
    assert sum(second["all"].values()) + sum(second["groups"].values()) <= 1.01 * planned.bytes_per_step
