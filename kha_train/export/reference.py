"""What an export is held against: our own logits, and the tokens at which equal programs must agree.

Two programs that compute the same function differ in the last bits. A router turns such a difference into another
expert where two scores nearly tie, and from that token on a row differs visibly. So tokens from the first near tie of a
row on are counted, but do not decide.
"""

# B rows   T tokens   N = B * T   D model width   V vocabulary   E experts   R groups of P experts

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kha_train.config.resolve import resolve_decoding
from kha_train.config.schema import RunConfig
from kha_train.errors import DivergedError
from kha_train.export.links import Link, Part
from kha_train.export.shards import Read
from kha_train.model.decoder import Decoder, build_decoder
from kha_train.model.init import reset_buffers
from kha_train.model.moe.router import Router

ROWS, TOKENS = 4, 64
TIE = 2e-6
"""Scores lie between 0 and 1. Closer ones may change places by rounding."""


class Reference(NamedTuple):
    """`tokens_BT` (int64), our fp32 `logits_BTV`, and which tokens decide, `decided_BT` (bool)."""

    tokens_BT: Tensor
    logits_BTV: Tensor
    decided_BT: Tensor


@torch.no_grad()
def reference_of(decoder: Decoder) -> Reference:
    """Rows of random tokens, always the same for a vocabulary. Raises DivergedError when our logits are not finite."""
    model = decoder.config.model
    shape = (ROWS, min(TOKENS, model.seq_len))
    tokens_BT = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    gaps: list[Tensor] = []
    hooks = [router.register_forward_hook(partial(_note, gaps)) for router in decoder.routers()]
    logits_BTV = decoder(tokens_BT).logits_BTV
    for hook in hooks:
        hook.remove()
    assert logits_BTV is not None
    if not torch.isfinite(logits_BTV).all():
        fix = "an older checkpoint may be intact: `kha checkpoint list`, `kha spikes`"
        raise DivergedError("the model's logits are not finite", field="checkpoint", fix=fix)
    decided_BT = torch.ones(shape, dtype=torch.bool)
    for gap_N in gaps:
        # A tie at a token changes what later tokens of its row attend to.
        decided_BT &= (gap_N.view(shape) < TIE).cumsum(dim=1) == 0
    return Reference(tokens_BT, logits_BTV, decided_BT)


def _note(gaps: list[Tensor], router: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
    """Keep by how much the choice of each token [N] was clear: the least gap between a score that was chosen and one
    that was not.
    """
    assert isinstance(router, Router)
    logit_NE = nn.functional.linear(inputs[0], router.weight)
    score_NE = logit_NE.sigmoid() if router.moe.score == "sigmoid" else logit_NE.softmax(dim=-1)
    choice_NE, groups = score_NE + router.selection_bias, router.moe.expert_groups
    gap_N = torch.full((len(choice_NE),), torch.inf)
    if groups > 1:
        choice_NRP = choice_NE.unflatten(-1, (groups, -1))
        best_NR = choice_NRP.topk(min(2, choice_NRP.shape[-1]), dim=-1).values.sum(dim=-1)
        gap_N = _gap(best_NR, router.moe.top_groups)
        closed_NR = best_NR < best_NR.topk(router.moe.top_groups, dim=-1).values[:, -1:]
        choice_NE = choice_NRP.masked_fill(closed_NR.unsqueeze(-1), float("-inf")).flatten(1)
    gaps.append(torch.minimum(gap_N, _gap(choice_NE, router.moe.top_k)))


def _gap(score_NE: Tensor, chosen: int) -> Tensor:
    """The distance between the last score that is chosen and the next one."""
    if chosen >= score_NE.shape[-1]:
        return torch.full((len(score_NE),), torch.inf)
    sorted_NE = score_NE.topk(chosen + 1, dim=-1).values
    return sorted_NE[:, chosen - 1] - sorted_NE[:, chosen]


@torch.no_grad()
def rounded_decoder(config: RunConfig, links: Iterable[Link], read: Read, dtype: torch.dtype) -> Decoder:
    """The decoder of `config` with the numbers that an export in `dtype` has, in fp32: each tensor is laid out as the
    host has it, rounded, and laid out as ours again. What no link holds is read as it is.
    """
    with torch.device("meta"):
        decoder = build_decoder(config, resolve_decoding(config))
    reset_buffers(decoder, config.run.seed, "cpu")
    state = decoder.state_dict()
    found: dict[str, Tensor] = {}
    for link in links:
        host = link.layout.to_host(tuple(read(part) for part in link.ours))
        kept = host if link.exact else tuple(tensor.to(dtype).float() for tensor in host)
        for part, tensor in zip(link.ours, link.layout.to_ours(kept), strict=True):
            if part.at is None:
                found[part.name] = tensor.contiguous()
            else:
                found.setdefault(part.name, torch.empty(state[part.name].shape))[part.at] = tensor
    if config.model.tie_embeddings:
        found["head.weight"] = found["embedding.weight"]
    found |= {name: read(Part(name)) for name in state.keys() - found.keys()}
    decoder.load_state_dict(found, assign=True)
    decoder.tie_weights()
    return decoder.eval()
