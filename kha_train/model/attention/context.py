"""Context parallelism (`engine.context_parallel`): the tokens of a row are cut over ranks, and attention alone sees
whole rows (Ulysses, arXiv 2309.14509).

Everything else acts on single tokens, interactions of heads included, for a token has all its heads on its rank. Around
the backend, ranks exchange tokens for heads: each computes a share of the heads over whole rows, and returns to every
rank the outputs of its tokens. Losses, loads and gradients of a rank are its tokens' parts of a sum over ranks, so the
ordinary reductions complete them.
"""

# B batch   T tokens of a rank   U = S T tokens of a row   S ranks that share a row   H heads   G key/value heads
# K, W key and value head width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kha_train.collectives import all_to_all
from kha_train.distributed import World
from kha_train.model.attention.backends import Backend, Documents
from kha_train.variants.attention import shared_key_repeats

T = TypeVar("T")


@dataclass(frozen=True)
class ContextRanks:
    """The `size` ranks that share every row, each an equal part of its tokens in order; this process is `rank` of
    `group`.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def own_heads(self, heads: Sequence[T]) -> Sequence[T]:
        """Of something for each query head, what belongs to the heads that this rank computes."""
        share = len(heads) // self.size
        return heads[self.rank * share : (self.rank + 1) * share]

    def total(self, counts: Tensor) -> Tensor:
        """The sum of `counts` over these ranks, without gradient. Collective."""
        summed = counts.detach().clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def attend(
        self, backend: Backend, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor, documents: Documents, scale: float
    ) -> Tensor:
        """What `backend` computes of whole rows, of which each rank holds the tokens that are its own: [B, T, H, W].

        `documents` are those of whole rows, for the heads of this rank. Collective, with four exchanges in each
        direction.
        """
        repeats = shared_key_repeats(q_BTHK.shape[2], k_BTGK.shape[2], self.size)
        if repeats > 1:
            k_BTGK, v_BTGW = (x.repeat_interleave(repeats, dim=2) for x in (k_BTGK, v_BTGW))
        q, k, v = (_exchange(x, self.group, self.size, False) for x in (q_BTHK, k_BTGK, v_BTGW))
        return _exchange(backend(q, k, v, documents, scale), self.group, self.size, True)


def context_ranks(world: World, size: int, timeout: timedelta) -> ContextRanks | None:
    """The consecutive ranks with which this one shares rows; None when each has rows of its own. Collective: every rank
    makes every group.
    """
    if size == 1:
        return None
    firsts = range(0, world.size, size)
    groups = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in firsts]
    return ContextRanks(groups[world.rank // size], world.rank % size, size)


class _Exchange(torch.autograd.Function):
    """[B, T, H, K], all heads of the tokens of this rank -> [B, U, H / S, K], all tokens of its heads; with `back` the
    reverse. The backward of each is the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, size: int, back: bool) -> Tensor:
        ctx.back = group, size, not back
        return exchanged(x, group, size, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(grad, *ctx.back), None, None, None


def exchanged(x: Tensor, group: dist.ProcessGroup, size: int, back: bool) -> Tensor:
    """See `_Exchange`. Collective, without gradient."""
    cut, joined = (1, 2) if back else (2, 1)
    # Along the dimension that is cut, part s goes to rank s.
    sent = x.unflatten(cut, (size, -1)).movedim(cut, 0).contiguous()
    received = torch.empty_like(sent)
    all_to_all(received, sent, group=group)
    return received.movedim(0, joined).flatten(joined, joined + 1)


# torch annotates neither `Function.apply` nor what it returns.
_exchange: Callable[..., Tensor] = _Exchange.apply
