"""The gradients of ZeRO 1 and 2 leave a rank by reduce-scatter, beside the backward. Needs no DeepSpeed import.

DeepSpeed 0.19 all-reduces them, which sends twice as much, and what it offers to hide that behind the backward is
unsafe (docs/decisions/reduction.md). It keeps a parameter group as one flat tensor, of which every rank owns an equal
share, and takes the gradient of that share in one flat tensor. So the gradient of a group needs no packing here: each
parameter's goes where it lies in the group, one reduce-scatter sums it, and the share is handed to DeepSpeed.

Under ZeRO 1 a rank sums its micro-batches first and sends once a step; under ZeRO 2 it sends each micro-batch and sums
in its share. A group leaves as soon as its last gradient is there, which is while the backward computes the layer
before. All ranks send in the same order, that of the backward, whatever is ready first.
"""

# P numbers of a parameter group, with padding   N ranks that share it   S = P / N numbers of a rank's share

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kha_train.collectives import begin_messages, equal_parts, wait_for
from kha_train.config.constants import GROUPS_IN_FLIGHT


class Reduction:
    """Sums the gradients of `decoder` over ranks for `optimizer`, which is DeepSpeed's of ZeRO 2, in place of its own
    reduction.
    """

    def __init__(self, optimizer: Any, decoder: nn.Module, divisor: int, each_micro_batch: bool) -> None:
        """Sums are divided by `divisor`. With `each_micro_batch` each is reduced, otherwise the sum of a step's."""
        self._optimizer, self._each_micro_batch = optimizer, each_micro_batch
        self.waits_for_backward = False
        """Whether nothing leaves before a backward has ended: set by a benchmark of what leaving early gains."""
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        place: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(decoder.parameters())}
        groups = [_Group(optimizer, number, divisor) for number in range(len(optimizer.bit16_groups))]
        # The backward completes a group when it reaches the first of its parameters.
        self._groups = sorted(groups, key=lambda group: min(place[one] for one in group.starts), reverse=True)
        self._group_of = {parameter: group for group in groups for parameter in group.starts}
        self._staying: deque[_Group] = deque()
        self._flying: deque[_Flight] = deque()
        self._hooks = [one.register_post_accumulate_grad_hook(self._take) for one in self._group_of]

    @contextmanager
    def beside_backward(self, last: bool) -> Iterator[None]:
        """Around the backward of a micro-batch; `last` marks the last of the step, after which the optimiser has the
        gradients of its shares. Collective.
        """
        for group in self._groups:
            group.missing = set(group.starts)
        self._staying.extend(self._groups if last or self._each_micro_batch else ())
        yield
        while self._staying:
            self._send_first()
        while self._flying:
            self._flying.popleft().land()
        if last:
            for group in self._groups:
                self._optimizer.averaged_gradients[group.number] = group.hand_over()

    def close(self) -> None:
        """Remove the hooks on the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, parameter: Tensor) -> None:
        self._group_of[parameter].take(parameter, leaves=bool(self._staying))
        while self._staying and not (self._staying[0].missing or self.waits_for_backward):
            self._send_first()

    def _send_first(self) -> None:
        if len(self._flying) == GROUPS_IN_FLIGHT:
            self._flying.popleft().land()
        if flight := self._staying.popleft().send():
            self._flying.append(flight)


class _Group:
    """The gradient of a parameter group: what this rank has accumulated, and the reduced gradient of its share."""

    def __init__(self, optimizer: Any, number: int, divisor: int) -> None:
        self.number, self._optimizer, self._divisor = number, optimizer, divisor
        self._ranks = optimizer.real_dp_process_group[number]
        self._size = optimizer.bit16_groups_flat[number].numel()
        self.starts: dict[Tensor, int] = {}
        self._end = 0
        for parameter in optimizer.bit16_groups[number]:
            self.starts[parameter] = self._end
            self._end += parameter.numel()
        self.missing: set[Tensor] = set()
        """Parameters whose gradient of this micro-batch is still to come."""
        self._sum_P: Tensor | None = None
        self._summed: set[Tensor] = set()
        self._share: Any = None

    def take(self, parameter: Tensor, leaves: bool) -> None:
        """Move the gradient of `parameter` into the sum, which `leaves` with this micro-batch."""
        self.missing.discard(parameter)
        part, gradient = self._part_of(parameter, leaves), parameter.grad
        assert gradient is not None
        (part.add_ if parameter in self._summed else part.copy_)(gradient)
        self._summed.add(parameter)
        parameter.grad = None

    def send(self) -> _Flight | None:
        """Send the sum, and begin the next one; None if no other rank has a share."""
        for parameter in self.starts.keys() - self._summed:
            self._part_of(parameter, leaves=True).zero_()
        assert self._sum_P is not None
        sum_P = self._sum_P.div_(self._divisor)
        self._sum_P, self._summed = None, set()
        if self._share is None:
            self._share = self._optimizer._build_compact_grad_partition_buffer(self.number)
        share_S = self._share.flat_partition
        if share_S.numel() == self._size:
            share_S.add_(sum_P)
            return None
        return _Flight(sum_P, share_S, self._optimizer.dtype, self._ranks)

    def hand_over(self) -> Any:
        """The gradient of the share, as DeepSpeed keeps it for its step."""
        share, self._share = self._share, None
        return share

    def _part_of(self, parameter: Tensor, leaves: bool) -> Tensor:
        if self._sum_P is None:
            # What leaves without being added to anything has the dtype in which it is sent.
            dtype = self._optimizer.dtype if leaves else self._optimizer.gradient_accumulation_dtype
            self._sum_P = torch.empty(self._size, dtype=dtype, device=parameter.device)
            self._sum_P[self._end :].zero_()
        return self._sum_P.narrow(0, self.starts[parameter], parameter.numel()).view_as(parameter)


class _Flight:
    """A sum on its way. It keeps what is sent until all of it has arrived."""

    def __init__(self, sum_P: Tensor, share_S: Tensor, dtype: torch.dtype, ranks: dist.ProcessGroup) -> None:
        self._sent_P, self._share_S = sum_P.to(dtype), share_S
        if sum_P.is_cuda:
            self._arriving = torch.empty_like(share_S, dtype=dtype)
            self._work = dist.reduce_scatter_tensor(self._arriving, self._sent_P, group=ranks, async_op=True)
        else:
            self._arriving = torch.empty_like(self._sent_P)
            size = dist.get_world_size(ranks)
            self._work = begin_messages(equal_parts(self._arriving, size), equal_parts(self._sent_P, size), ranks)

    def land(self) -> None:
        """Wait for the sum, and add it to the share; on gloo the part of each rank, in their order."""
        wait_for(self._work)
        for arrived_S in self._arriving.view(-1, self._share_S.numel()):
            self._share_S.add_(arrived_S)
