"""Experts spread over ranks (`engine.expert_parallel`): a copy of each token travels to the rank of every expert that
it chose, and the result travels back. Dropless: messages are as long as the router's choice makes them.

The rank of an expert computes it with the backend of one rank, each received row as a token of one choice. Rows and
their results cross four times in a step: once in each direction in the forward, and again in the backward.
Recomputation sends the rows once more; their results only if something after them in the block is recomputed too.
"""

# N tokens of this rank   D model width   F expert width   X = 2F, gate and up side by side   E experts
# J experts per token   M = N * J copies sent, sorted by expert   S ranks that share the experts
# P = E / S experts of a rank   R copies received

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kha_train.collectives import all_to_all
from kha_train.model.moe.grouped import KERNELS, Placement, place
from kha_train.model.moe.router import Routing

Run = Callable[[Tensor, Tensor, Tensor, Routing], Tensor]
"""(x_ND, gate_up_EDX, down_EFD, routing) -> the weighted sum of every token's experts, [N, D]."""


@dataclass(frozen=True)
class ExpertRanks:
    """The `size` ranks that share the experts of every layer, each an equal part in order; this process is `rank` of
    `group`.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def own(self, experts: Tensor) -> Tensor:
        """This rank's part of all experts, [E, ...] -> [P, ...]: a contiguous part of the flattened tensor."""
        assert experts.shape[0] % self.size == 0, "the ranks hold equally many experts"
        return experts.chunk(self.size)[self.rank].clone()


def run_exchanged(
    ranks: ExpertRanks,
    kernels: str,
    run: Run,
    x_ND: Tensor,
    gate_up_PDX: Tensor,
    down_PFD: Tensor,
    routing: Routing,
) -> Tensor:
    """The weighted sum of every token's experts, [N, D], where `gate_up_PDX` and `down_PFD` are this rank's experts and
    `routing` chooses among all E. `run` computes the experts of one rank, `kernels` (`torch` or `triton`) sort the
    copies. Collective over `ranks`: every rank calls it equally often, with any number of tokens.

    The host waits for the device once, for the lengths of the messages.
    """
    sent = place(routing.expert_NJ, routing.load_E)
    load_SP = routing.load_E.view(ranks.size, -1)
    loads_2SP = torch.empty(2, *load_SP.shape, dtype=load_SP.dtype, device=load_SP.device)
    loads_2SP[0] = load_SP
    arriving_SP = loads_2SP[1]
    all_to_all(arriving_SP, load_SP, group=ranks.group)
    sends, receives = loads_2SP.cpu().sum(dim=2).tolist()

    x_RD = _exchange(_permute(x_ND, sent, kernels), sends, receives, ranks.group)
    # A weight is one number of one copy: a row of its own.
    each = Placement(sent.order_M, sent.home_NJ.view(-1, 1), sent.ends_E)
    weight_R1 = _exchange(_permute(routing.weight_NJ.reshape(-1, 1), each, "torch"), sends, receives, ranks.group)
    expert_SP = torch.arange(load_SP.shape[1], device=x_ND.device).repeat(ranks.size)
    expert_R = expert_SP.repeat_interleave(arriving_SP.flatten(), output_size=sum(receives))
    here = Routing(expert_R.unsqueeze(1), weight_R1, arriving_SP.sum(dim=0))
    y_RD = run(x_RD, gate_up_PDX, down_PFD, here)
    return _combine(_exchange(y_RD, receives, sends, ranks.group), sent, kernels)


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that want them: `sends[s]` of this rank's rows to rank s, `receives[s]` from it. The backward
    returns their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = receives, sends, group
        return exchanged(x, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(grad, *ctx.back), None, None, None


def exchanged(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that arrive on this rank, in the order of the ranks they come from. Collective, without gradient."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    all_to_all(out, x.contiguous(), receives, sends, group)
    return out


class _Permute(torch.autograd.Function):
    """Tokens -> their copies, sorted by expert. The backward sums a token's copies in the order of its choices, as one
    rank does: sums by index would be in bf16 and, on CUDA, in an order of chance.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, placed: Placement, kernels: str) -> Tensor:
        ctx.save_for_backward(placed.home_NJ)
        ctx.kernels = kernels
        return KERNELS[kernels].permute(x_ND.contiguous(), placed.order_M, placed.home_NJ)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grad_MD, ctx.saved_tensors[0], ctx.kernels), None, None


class _Combine(torch.autograd.Function):
    """Copies, sorted by expert -> the sum of each token's copies; the reverse of `_Permute`.

    It keeps `placed` itself instead of saving it: so recomputation ends before the results travel back.
    """

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, placed: Placement, kernels: str) -> Tensor:
        ctx.placed, ctx.kernels = placed, kernels
        return _summed(y_MD, placed.home_NJ, kernels)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        order_M, home_NJ, _ = ctx.placed
        return KERNELS[ctx.kernels].permute(grad_ND.contiguous(), order_M, home_NJ), None, None


def _summed(y_MD: Tensor, home_NJ: Tensor, kernels: str) -> Tensor:
    if not home_NJ.numel():
        # A micro-batch that is all padding: kernels do not support sums without rows.
        return y_MD.new_zeros(home_NJ.shape[0], y_MD.shape[1])
    return KERNELS[kernels].combine(y_MD.contiguous(), home_NJ)


# torch annotates neither `Function.apply` nor what it returns.
_exchange: Callable[..., Tensor] = _Exchange.apply
_permute: Callable[..., Tensor] = _Permute.apply
_combine: Callable[..., Tensor] = _Combine.apply
