"""Planned memory: formulas by hand and, on two real ranks, against the peak the kernel saw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kha_train import build_decoder, compose
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.estimate.memory import (
    GIB,
    activation_bytes,
    block_activations,
    largest_micro_batch,
    plan_memory,
    recipes,
)
from kha_train.variants.optimizer import AdamWOptions

WORKER = Path(__file__).with_name("memory_worker.py")
SIX_BILLION = ["model=moe_6b", "engine.micro_batch_size=1", "data.global_batch_size=512"]
MEASURED = {
    "zero1, 512 tokens": ["engine=zero1", "engine.micro_batch_size=2", "model.seq_len=256", "data.global_batch_size=8"],
    "zero2, 128 tokens": ["engine=zero2", "engine.micro_batch_size=1", "model.seq_len=128", "data.global_batch_size=4"],
    "zero3, 128 tokens": ["engine=zero3", "engine.micro_batch_size=1", "model.seq_len=128", "data.global_batch_size=4"],
}
SHAPE = [
    "model.layers=4",
    "model.hidden_size=512",
    "model.vocab_size=32768",
    "moe.experts=64",
    "moe.expert_width=512",
    "cluster=cpu",
]
"""219M parameters."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_planned_memory_is_within_15_percent_of_the_measured_peak(
    case: str, run_ranks: Callable[..., list[Any]]
) -> None:
    overrides = [*SHAPE, *MEASURED[case]]
    planned = plan_memory(compose(overrides))
    measured = max(run_ranks(WORKER, 2, fresh=True, overrides=overrides))
    print(f"{case}: planned {planned.total / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB, {planned.terms}")
    assert planned.total == pytest.approx(measured, rel=0.15)


def test_the_page_of_the_plan_shows_what_is_planned() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    table = page[page.index("| MiB | ZeRO 1, 512 tokens") :].partition("\n\n")[0].splitlines()
    cells = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in table]
    shown = {name: [int(figure.replace(",", "")) for figure in figures] for name, *figures in cells[2:-1]}
    plans = [plan_memory(compose([*SHAPE, *overrides])) for overrides in MEASURED.values()]
    assert shown.pop("planned") == [round(plan.total / 2**20) for plan in plans]
    shown.pop("measured")
    assert shown == {name: [round(plan.terms[name] / 2**20) for plan in plans] for name in shown}


ADAMW = recipes(AdamWOptions(lr=1e-3))


@pytest.mark.parametrize(("recipe", "bytes_per_parameter"), list(zip(ADAMW, (20, 18, 16, 12, 8, 4), strict=True)))
def test_recipes_cost_their_bytes_on_one_rank_and_shard_by_stage(recipe: Any, bytes_per_parameter: int) -> None:
    total = 6_102_268_416
    for stage in (1, 2, 3):
        assert recipe.states(total, stage, 1) == bytes_per_parameter * total
    first, second, third = (recipe.states(total, stage, 8) for stage in (1, 2, 3))
    assert third == pytest.approx(bytes_per_parameter * total / 8, abs=8)
    assert first - second == pytest.approx(recipe.gradients * total * 7 / 8, abs=8)
    assert second - third == pytest.approx(recipe.parameters * total * 7 / 8, abs=8)


def test_model_states_of_the_6b_model_are_the_textbook_figures() -> None:
    """16 bytes a parameter: 90.9 GiB on one rank; over 8: 31.3 (ZeRO 1), 21.3 (ZeRO 2), 11.4 (ZeRO 3)."""
    (recipe,) = (recipe for recipe in ADAMW if recipe.name == "bf16, gradients in bf16")
    total = 6_102_268_416
    assert recipe.states(total, 1, 1) / GIB == pytest.approx(90.9, abs=0.05)
    states = [recipe.states(total, stage, 8) / GIB for stage in (1, 2, 3)]
    assert states == pytest.approx([31.3, 21.3, 11.4], abs=0.05)


def test_the_terms_of_zero_1_in_bf16_by_hand() -> None:
    config = compose([*SIX_BILLION, "cluster=h100_1x8", "engine.activation_checkpointing=full"])
    terms, total = plan_memory(config).terms, 6_102_268_416
    assert terms["parameters"] == 2 * total and terms["optimizer"] == 12 * total // 8
    assert terms["gradients"] == 4 * total and terms["buckets"] == terms["gathered"] == 0


def test_a_second_sharding_within_the_node_is_counted() -> None:
    overrides = [*SIX_BILLION, "cluster=h100_8x8", "engine=zero3"]
    plain, second = (plan_memory(compose([*overrides, f"engine.hpz_partition_size={size}"])).terms for size in (1, 8))
    assert plain["parameters"] == 2 * 6_102_268_416 // 64
    assert second["parameters"] - plain["parameters"] == 2 * 6_102_268_416 // 8


@pytest.mark.parametrize("variant", ["gqa", "mha"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_block_saves_about_what_torch_keeps_for_its_backward(variant: str, dense: bool) -> None:
    """Counted through saved-tensor hooks, each storage once, weights left out."""
    experts = ["moe.experts=16", "moe.top_k=4"]
    if dense:
        experts = ["moe.dense_layers=2", "moe.dense_width=512", *(f"moe.{key}=0" for key in ("experts", "top_k"))]
        experts.append("moe.expert_width=0")
    config = compose([f"attention={variant}", "model.layers=2", "model.seq_len=128", *experts, "cluster=cpu"])
    decoder, kept = build_decoder(config), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, 100, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(tokens)
    blocks = 2 * block_activations(config)[1 if dense else 0] * 128 * 4
    measured = sum(size for size, _ in kept.values())
    assert blocks == pytest.approx(measured, rel=0.2)


def test_recomputation_leaves_one_block_and_the_inputs_of_all() -> None:
    config = compose([*SIX_BILLION, "cluster=h100_1x8", "attention.backend=sdpa"])
    full = replace(config, engine=replace(config.engine, activation_checkpointing="full"))
    expected = 8192 * 2 * (18 * 2048 + block_activations(config)[0] + 3 * 2048)
    assert activation_bytes(full) == expected < activation_bytes(config) / 9


def test_the_largest_micro_batch_fits_and_one_more_row_does_not() -> None:
    config = compose([*SIX_BILLION, "cluster=h200_1x8"])
    budget = 100 * GIB
    rows = largest_micro_batch(config, budget)
    assert rows >= 1
    for size, fits in ((rows, True), (rows + 1, False)):
        tried = replace(config, engine=replace(config.engine, micro_batch_size=size))
        assert (plan_memory(tried).total <= budget) is fits
    assert largest_micro_batch(config, 10 * GIB) == 0


@pytest.mark.gpu
def test_planned_memory_of_cuda_is_within_15_percent_of_the_allocated_peak() -> None:
    from kha_train import distributed
    from kha_train.engine.deepspeed import Engine

    config = compose(["model=moe_2_3b", "model.layers=4", "cluster=h100_1x1", "data.global_batch_size=2"])
    config = replace(config, engine=replace(config.engine, micro_batch_size=1, device="cuda"))
    engine = Engine(config, distributed.start("cuda", 300.0))
    device = engine.world.device
    torch.cuda.reset_peak_memory_stats(device)
    rows_BW = np.zeros((1, config.model.seq_len + 1), dtype=np.uint16)
    layout = Layout(np.array([0, config.model.seq_len]), np.empty(0, dtype=np.int64))
    batch = Batch(np.arange(1), rows_BW, layout)
    for last in (False, True):
        engine.accumulate(batch, 1.0, 0.0, last)
    engine.apply(1e-4)
    assert plan_memory(config).total == pytest.approx(torch.cuda.max_memory_allocated(device), rel=0.15)
    engine.close()
    Engine.leave_world()
