"""Our collectives on a CPU beside torch's; reports which results differ, in which order a rank's messages are posted,
and how often a rank waits where the watchdog sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kha_train import collectives, distributed
from kha_train.distributed import World

torch.set_num_threads(1)


def numbers(rank: int, *shape: int) -> Tensor:
    """Those that `rank` sends, unlike those of the others; a negative zero shows that they are copied bit for bit."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    drawn.view(-1)[:1] = -0.0
    return drawn


def bits(one: Tensor) -> bytes:
    return one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if one.numel() else b""


def exchanges(world: World) -> dict[str, bool]:
    """Whether each exchange of rows gives what torch's gives."""
    size, rank = world.size, world.rank
    # From rank a to rank b go a * b rows: none from and to the first.
    sends, receives = [rank * to for to in range(size)], [of * rank for of in range(size)]
    uneven = numbers(rank, sum(sends), 3)
    cases: dict[str, tuple[Tensor, int, list[int] | None, list[int] | None]] = {
        "equal": (numbers(rank, 2 * size, 3), 2 * size, None, None),
        "integers": (torch.arange(size) + 10 * rank, size, None, None),
        "bf16": (numbers(rank, size).bfloat16(), size, None, None),
        "uneven": (uneven, sum(receives), receives, sends),
        "wants a gradient": (numbers(rank, size, 2).requires_grad_(), size, None, None),
    }
    same = {}
    for name, (leaving, rows, arriving_rows, leaving_rows) in cases.items():
        ours, theirs = (leaving.new_empty(rows, *leaving.shape[1:]) for _ in range(2))
        collectives.all_to_all(ours, leaving, arriving_rows, leaving_rows)
        dist.all_to_all_single(theirs, leaving.detach(), arriving_rows, leaving_rows)
        same[name] = bits(ours.detach()) == bits(theirs)
    return same


def gathers(world: World) -> dict[str, bool]:
    """Whether a gather gives what torch's gives: into new memory, and where this rank's part lies in the whole."""
    part = numbers(world.rank, 4)
    expected = torch.cat([numbers(rank, 4) for rank in range(world.size)])
    apart, inside = torch.empty(4 * world.size), torch.empty(4 * world.size)
    collectives.all_gather(output_tensor=apart, input_tensor=part)
    own = inside.narrow(0, 4 * world.rank, 4).copy_(part)
    works = collectives.all_gather(inside, own, async_op=True)
    assert works is not None
    works.wait()
    works.wait()
    return {"apart": bits(apart) == bits(expected), "inside": bits(inside) == bits(expected)}


def scattered(world: World) -> bool:
    """Whether the share is the sum in the order of ranks, bit for bit, where it lies in the whole."""
    whole = numbers(world.rank, 5 * world.size)
    share = whole.narrow(0, 5 * world.rank, 5)
    expected = numbers(0, 5 * world.size).chunk(world.size)[world.rank].clone()
    for rank in range(1, world.size):
        expected.add_(numbers(rank, 5 * world.size).chunk(world.size)[world.rank])
    collectives.ordered_reduce_scatter(share, whole)
    return bits(share) == bits(expected)


def posted(world: World) -> list[str]:
    """The messages of an exchange, in the order in which this rank posts them."""
    events = []
    real = {"irecv": dist.irecv, "isend": dist.isend}

    def noted(name: str) -> Callable[..., Any]:
        def message(*given: Any, **options: Any) -> Any:
            events.append(f"{name} {options.get('group_src', options.get('group_dst'))}")
            return real[name](*given, **options)

        return message

    dist.irecv, dist.isend = noted("irecv"), noted("isend")
    collectives.all_to_all(torch.empty(world.size), torch.ones(world.size))
    dist.irecv, dist.isend = real["irecv"], real["isend"]
    return events


def refused(world: World) -> bool:
    """Whether rows that do not divide among the ranks are refused, as by torch on every rank."""
    try:
        collectives.all_to_all(torch.empty(world.size + 1), torch.empty(world.size + 1))
    except RuntimeError:
        return True
    return False


def seen_waits(world: World) -> int:
    """How often a gather, as DeepSpeed waits for it, waits where the watchdog sees it."""
    count, real = [0], collectives.wait_for

    def counted(work: collectives.Waited) -> None:
        count[0] += 1
        real(work)

    collectives.wait_for = counted
    works = collectives.all_gather(torch.empty(world.size), torch.ones(1), async_op=True)
    assert works is not None
    works.wait()
    collectives.wait_for = real
    return count[0]


if __name__ == "__main__":
    world = distributed.start("cpu", 60.0)
    answer = {
        "exchanges": exchanges(world),
        "gathers": gathers(world),
        "scattered": scattered(world),
        "posted": posted(world),
        "refused": refused(world),
        "seen_waits": seen_waits(world),
    }
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answer))
