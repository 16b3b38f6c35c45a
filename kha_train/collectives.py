"""Collectives that use both directions of a link at the same time on gloo, and that gloo lacks. NCCL has its own.

gloo's all-to-all sends before it says that it can receive. A rank that comes after another finds that one ready, so it
sends at once, and its own word that it is ready waits behind what it sends: one direction after the other, at half the
speed. Its all-gather does the same with two ranks; with more, parts go round a ring, in one direction of every link.
Here ranks on a CPU post their receives first, then send each part straight to the rank that wants it, to the next one
first. The bytes are the same.
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


class Messages:
    """Messages between the ranks of a group on a CPU, on their way. They keep the tensors that are sent."""

    def __init__(self, arriving: Sequence[Tensor], leaving: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        """Part s of `leaving` goes to rank s of the group, and part s of `arriving` comes from it. Empty parts are not
        sent. Every rank makes its messages of a group in the same order.
        """
        here, size = dist.get_rank(group), len(leaving)
        # In turns, so that each rank receives from one other at a time, and not all of them from the same.
        others = [(here + turn) % size for turn in range(1, size)]
        works = [dist.irecv(arriving[rank], group=group, group_src=rank) for rank in others if arriving[rank].numel()]
        works += [dist.isend(leaving[rank], group=group, group_dst=rank) for rank in others if leaving[rank].numel()]
        if arriving[here].data_ptr() != leaving[here].data_ptr():
            arriving[here].copy_(leaving[here])
        self._kept, self._works = leaving, works

    def wait(self) -> None:
        """Until all have arrived."""
        for work in self._works:
            assert work is not None, "only ranks of the group send"
            wait_for(work)


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
    else:
        Messages(_parts(arriving, receives, group), _parts(leaving, sends, group), group).wait()


def all_gather(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Waited | None:
    """torch's all-gather into one tensor, on a CPU, with the names of its arguments. `input_tensor` may be this
    rank's part of `output_tensor`.
    """
    ranks = dist.get_world_size(group)
    if ranks > 2:
        work: Waited | None = dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        return work
    messages = Messages(output_tensor.view(-1).chunk(ranks), [input_tensor.reshape(-1)] * ranks, group)
    if async_op:
        return messages
    messages.wait()
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


def _parts(whole: Tensor, sizes: list[int] | None, group: dist.ProcessGroup | None) -> Sequence[Tensor]:
    return whole.split(sizes) if sizes is not None else whole.chunk(dist.get_world_size(group))
