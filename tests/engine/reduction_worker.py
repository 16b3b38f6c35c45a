"""Backwards of a chain of maps on ranks that reduce their gradients; reports shares that differ from sums made by hand,
and the order in which gradients are computed and groups leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kha_train import distributed
from kha_train.collectives import Works, begin_messages
from kha_train.distributed import World
from kha_train.engine import reduction as reducing
from kha_train.engine.reduction import Reduction

torch.set_num_threads(1)
WIDTH, MAPS, MICRO_BATCHES, STEPS = 5, 4, 3, 2
UNUSED = 2
"""On the last rank this map is left out, as if nothing reached it."""


class Chain(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(MAPS))

    def forward(self, x: Tensor, unused: int | None) -> Tensor:
        for number, layer in enumerate(self.maps):
            x = x if number == unused else layer(x).tanh()
        return x.float().sum()


def owner_of(chain: Chain, world: World, wide: torch.dtype) -> Any:
    """What DeepSpeed's optimizer tells of its groups: the matrix of each map, and all vectors, with padding."""
    groups = [*([layer.weight] for layer in chain.maps), [layer.bias for layer in chain.maps]]
    sizes = [sum(one.numel() for one in group) for group in groups]
    whole = [-(-size // (2 * world.size)) * 2 * world.size for size in sizes]

    def share_of(number: int) -> Any:
        return SimpleNamespace(flat_partition=torch.zeros(whole[number] // world.size, dtype=wide))

    return SimpleNamespace(
        bit16_groups=groups,
        bit16_groups_flat=[torch.empty(size) for size in whole],
        real_dp_process_group=[dist.group.WORLD] * len(groups),
        dtype=chain.maps[0].weight.dtype,
        gradient_accumulation_dtype=wide,
        averaged_gradients={},
        _grad_acc_hooks=[],
        _build_compact_grad_partition_buffer=share_of,
    )


def input_of(rank: int, number: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(7, WIDTH, generator=drawn).to(dtype)


def by_hand(
    group: list[Tensor], numbers: list[int], chain: Chain, world: World, wide: torch.dtype, each: bool
) -> Tensor:
    """The gradient of a group over ranks and micro-batches, in the order and the dtypes that are promised."""
    narrow, total = group[0].dtype, torch.zeros(sum(one.numel() for one in group), dtype=wide)
    gradients = []
    for number in numbers:
        of_ranks = []
        for rank in range(world.size):
            unused = UNUSED if rank == world.size - 1 else None
            loss = chain(input_of(rank, number, narrow), unused)
            found = torch.autograd.grad(loss, group, allow_unused=True)
            parts = zip(found, group, strict=True)
            of_ranks.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts]))
        gradients.append(of_ranks)
    if not each:
        sums = [gradients[0][rank].to(wide) for rank in range(world.size)]
        for of_ranks in gradients[1:]:
            sums = [have + more.to(wide) for have, more in zip(sums, of_ranks, strict=True)]
        gradients = [sums]
    for of_ranks in gradients:
        for gradient in of_ranks:
            total += (gradient / world.size).to(narrow)
    return total


def run(world: World, narrow: torch.dtype, wide: torch.dtype, each: bool, waits: bool = False) -> dict[str, Any]:
    """Steps of a chain; `each` micro-batch is reduced or their sum."""
    torch.manual_seed(0)
    chain = Chain(narrow)
    optimizer = owner_of(chain, world, wide)
    reduction, events = Reduction(optimizer, chain, world.size, each), []
    reduction.waits_for_backward = waits
    for number, layer in enumerate(chain.maps):
        layer.weight.register_hook(lambda grad, number=number: events.append(f"computed {number}"))

    def watched(arriving: Sequence[Tensor], leaving: Sequence[Tensor], group: Any) -> Works:
        events.append(f"left {sum(part.numel() for part in leaving)}")
        return begin_messages(arriving, leaving, group)

    reducing.begin_messages = watched
    wrong = []
    for step in range(STEPS):
        numbers = [step * MICRO_BATCHES + count for count in range(MICRO_BATCHES)]
        events.clear()
        for number in numbers:
            unused = UNUSED if world.rank == world.size - 1 else None
            loss = chain(input_of(world.rank, number, narrow), unused)
            with reduction.beside_backward(last=number == numbers[-1]):
                loss.backward()
        told = list(events)
        for count, group in enumerate(optimizer.bit16_groups):
            share = optimizer.averaged_gradients[count].flat_partition
            expected = torch.zeros(share.numel() * world.size, dtype=wide)
            hand = by_hand(group, numbers, chain, world, wide, each)
            expected[: hand.numel()] = hand
            if not torch.equal(share, expected.chunk(world.size)[world.rank]):
                wrong.append(f"step {step}, group {count}")
        if any(parameter.grad is not None for parameter in chain.parameters()):
            wrong.append(f"step {step}: a gradient stays")
    reducing.begin_messages = begin_messages
    reduction.close()
    return {"wrong": wrong, "events": told}


if __name__ == "__main__":
    world = distributed.start("cpu", 60.0)
    narrow, wide = torch.bfloat16, torch.float32
    answer = {
        "ZeRO 1": run(world, wide, wide, each=False),
        "ZeRO 2": run(world, wide, wide, each=True),
        "ZeRO 1, bf16 summed in fp32": run(world, narrow, wide, each=False),
        "ZeRO 2, bf16 summed in fp32": run(world, narrow, wide, each=True),
        "ZeRO 2, bf16": run(world, narrow, narrow, each=True),
        "ZeRO 2, after the backward": run(world, wide, wide, each=True, waits=True),
    }
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answer))
