"""Collectives that use both directions of a link at the same time on gloo, and that gloo lacks. NCCL has its own.

gloo's all-to-all sends before it says that it can receive. A rank that comes after another finds that one ready, so it
sends at once, and its own word that it is ready waits behind what it sends: one direction after the other, at half the
speed. Its all-gather does the same with two ranks. Here ranks on a CPU post their receives first, then send each part
straight to the rank that wants it. The bytes are the same. With more than two ranks gloo's all-gather is used: it
passes parts round a ring, which four ranks do at the speed of the link, where direct messages meet at a rank and took
1.2 to 1.5 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Waited(Protocol):
    """What has begun and can be waited for."""

    def wait(self) -> object:
        """Until it has ended."""


def wait_for(work: Waited) -> None:
    """Wait until a collective that was begun with `async_op` has ended; on a GPU, the stream waits and not the host.
    The watchdog knows a rank that waits for others by this frame.
    """
    work.wait()


class Works:
    """Collectives and messages that have begun."""

    def __init__(self, works: Sequence[Waited]) -> None:
        self._works = works

    def wait(self) -> None:
        """Until all have ended; the second time at once."""
        works, self._works = self._works, ()
        for work in works:
            wait_for(work)


def begin_messages(arriving: Sequence[Tensor], leaving: Sequence[Tensor], group: dist.ProcessGroup | None) -> Works:
    """Part s of `leaving` goes to rank s of the group, and part s of `arriving` comes from it, on a CPU. Empty parts
    are not sent. Every rank makes its messages of a group in the same order.
    """
    here, size = dist.get_rank(group), dist.get_world_size(group)
    assert len(arriving) == len(leaving) == size
    # The next rank first, so that not all begin with the same one.
    others = [(here + turn) % size for turn in range(1, size)]
    works = [dist.irecv(arriving[rank], group=group, group_src=rank) for rank in others if arriving[rank].numel()]
    works += [dist.isend(leaving[rank], group=group, group_dst=rank) for rank in others if leaving[rank].numel()]
    if arriving[here].data_ptr() != leaving[here].data_ptr():
        arriving[here].copy_(leaving[here].detach())
    # Only a rank outside the group has None.
    return Works([work for work in works if work is not None])


def all_to_all(
    arriving: Tensor,
    leaving: Tensor,
    receives: list[int] | None = None,
    sends: list[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """`dist.all_to_all_single`: along the first dimension `sends[s]` of `leaving` go to rank s, and `receives[s]` of
    `arriving` come from it; equal parts without them.
    """
    if leaving.is_cuda:
        dist.all_to_all_single(arriving, leaving, receives, sends, group=group)
        return
    ranks = dist.get_world_size(group)
    into = equal_parts(arriving, ranks) if receives is None else arriving.split(receives)
    out_of = equal_parts(leaving, ranks) if sends is None else leaving.split(sends)
    begin_messages(into, out_of, group).wait()


def all_gather(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Works | None:
    """torch's all-gather into one tensor, on a CPU, with the names of its arguments. `input_tensor` may be this
    rank's part of `output_tensor`.
    """
    ranks = dist.get_world_size(group)
    if ranks > 2:
        works = Works([dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op=True)])
    else:
        works = begin_messages(equal_parts(output_tensor.view(-1), ranks), [input_tensor.reshape(-1)] * ranks, group)
    if async_op:
        return works
    works.wait()
    return None


def ordered_reduce_scatter(
    share: Tensor, whole: Tensor, op: object = None, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> None:
    """`dist.reduce_scatter_tensor` of sums on a CPU, added in the order of ranks; gloo's own sends as much as an
    all-reduce. `share` may be a part of `whole`.
    """
    arrived = torch.empty_like(whole)
    all_to_all(arrived, whole, group=group)
    first, *others = arrived.view(-1, share.numel())
    share.copy_(first)
    for part in others:
        share.add_(part)


def equal_parts(whole: Tensor, count: int) -> Sequence[Tensor]:
    """`whole` in `count` parts along the first dimension, which they must divide: `chunk` would give fewer."""
    parts: Sequence[Tensor] = whole.unflatten(0, (count, whole.shape[0] // count)).unbind()
    return parts
