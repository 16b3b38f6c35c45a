"""Where the queries, keys, values and outputs of heads are in attention modules of other libraries.

A layout is known by its name, so that a file can name it; which class has which layout is a table of names, so that no
library needs to be imported.
"""

# N outputs of a projection   H heads   K head width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import HeadsError


@dataclass(frozen=True)
class Piece:
    """The part of a projection's outputs (of its inputs, for `o_proj`) that the heads of one kind are: from `start` on,
    `heads` blocks of `block` numbers, in each of which the head has `width` numbers from `offset` on. The projection
    has `outputs` in all.
    """

    projection: str
    outputs: int
    heads: int
    width: int
    block: int
    start: int = 0
    offset: int = 0

    def changed(self, x_N: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., N] with these heads replaced by what `change` makes of them, [..., H, K] -> [..., H, K].

        A projection that has only these heads may be a tensor-parallel share, with fewer of them.
        """
        if self.heads * self.width == self.outputs:
            return change(x_N.unflatten(-1, (-1, self.width))).flatten(-2)
        span = self.heads * self.block
        before, blocks, after = x_N.split((self.start, span, self.outputs - self.start - span), dim=-1)
        parts = (self.offset, self.width, self.block - self.offset - self.width)
        first, heads_HK, last = blocks.unflatten(-1, (self.heads, self.block)).split(parts, dim=-1)
        blocks = torch.cat((first, change(heads_HK), last), dim=-1).flatten(-2)
        return torch.cat((before, blocks, after), dim=-1)


class Layout(NamedTuple):
    """The pieces of one attention module. `reads` names a projection whose input is that of the attention. `latent`:
    keys and values are made of a latent, which decoding may attend to without ever making them.
    """

    q: Piece
    k: Piece
    v: Piece
    output: Piece
    reads: str
    latent: bool = False


def _separate(attention: nn.Module, names: tuple[str, str, str, str], width: int) -> Layout:
    """Three projections of their own."""
    q, k, v = (_alone(name, _size(attention, name), width) for name in names[:3])
    return Layout(q, k, v, _alone(names[3], _size(attention, names[3], "in_features"), width), names[0])


def _fused(attention: nn.Module, names: tuple[str, str], query_heads: int, kv_heads: int, width: int) -> Layout:
    """One projection [all queries | all keys | all values]."""
    name, outputs = names[0], _size(attention, names[0])
    q = Piece(name, outputs, query_heads, width, width)
    k = Piece(name, outputs, kv_heads, width, width, start=query_heads * width)
    v = Piece(name, outputs, kv_heads, width, width, start=(query_heads + kv_heads) * width)
    if v.start + kv_heads * width != outputs:
        raise _surprise(attention, f"{name} has {outputs} outputs", f"{v.start + kv_heads * width}")
    return Layout(q, k, v, _alone(names[1], _size(attention, names[1], "in_features"), width), names[0])


def _transformers(attention: Any) -> Layout:
    layout = _separate(attention, ("q_proj", "k_proj", "v_proj", "o_proj"), attention.head_dim)
    return _checked(attention, layout, attention.num_key_value_groups)


def _transformers_fused(attention: Any) -> Layout:
    config = attention.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layout = _fused(attention, ("qkv_proj", "o_proj"), heads, kv_heads, attention.head_dim)
    return _checked(attention, layout, attention.num_key_value_groups)


def _transformers_latent(attention: Any) -> Layout:
    """Multi-head latent attention: of queries and keys, the parts without rotation."""
    heads, plain, rotary, width = (
        attention.num_heads,
        attention.qk_nope_head_dim,
        attention.qk_rope_head_dim,
        attention.v_head_dim,
    )
    query = "q_proj" if attention.q_lora_rank is None else "q_b_proj"
    outputs = _size(attention, "kv_b_proj")
    layout = Layout(
        Piece(query, _size(attention, query), heads, plain, plain + rotary),
        Piece("kv_b_proj", outputs, heads, plain, plain + width),
        Piece("kv_b_proj", outputs, heads, width, plain + width, offset=plain),
        _alone("o_proj", _size(attention, "o_proj", "in_features"), width),
        "kv_a_proj_with_mqa",
        latent=True,
    )
    return _checked(attention, layout, 1)


def _olmo_core(attention: Any) -> Layout:
    layout = _separate(attention, ("w_q", "w_k", "w_v", "w_out"), attention.head_dim)
    return _checked(attention, layout, attention.n_heads // attention.n_kv_heads)


def _olmo_core_fused(attention: Any) -> Layout:
    heads, kv_heads = attention.n_heads, attention.n_kv_heads
    layout = _fused(attention, ("w_qkv", "w_out"), heads, kv_heads, attention.head_dim)
    return _checked(attention, layout, heads // kv_heads)


LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "transformers": _transformers,
    "transformers_fused": _transformers_fused,
    "transformers_latent": _transformers_latent,
    "olmo_core": _olmo_core,
    "olmo_core_fused": _olmo_core_fused,
}
"""By name, the function that finds the heads in an attention module."""
FAMILIES: dict[str, str] = {
    "LlamaAttention": "transformers",
    "Qwen3Attention": "transformers",
    "Qwen3MoeAttention": "transformers",
    "Glm4MoeAttention": "transformers",
    "Olmo2Attention": "transformers",
    "OlmoeAttention": "transformers",
    "Phi3Attention": "transformers_fused",
    "DeepseekV3Attention": "transformers_latent",
    "olmo_core.nn.attention.Attention": "olmo_core",
    "olmo_core.nn.attention.FusedAttentionV2": "olmo_core_fused",
}
"""The layout of every attention class that was tried; a class is named with or without its module."""


def layout_of(attention: nn.Module, name: str) -> Layout:
    """The pieces of `attention`, whose layout is called `name`. Raises HeadsError if it does not have that layout."""
    try:
        return LAYOUTS[name](attention)
    except AttributeError as error:
        raise HeadsError(f"{type(attention).__name__} does not have the layout {name}: {error}") from error


def _alone(name: str, outputs: int, width: int) -> Piece:
    return Piece(name, outputs, outputs // width, width, width)


def _size(attention: nn.Module, name: str, side: str = "out_features") -> int:
    """The outputs or inputs of a projection, which its weight does not tell if it is sharded or quantised."""
    size: int = getattr(getattr(attention, name), side)
    return size


def _checked(attention: nn.Module, layout: Layout, groups: int) -> Layout:
    """Another meaning of the same names, such as queries with gates beside them, shows in the number of heads."""
    expected = {"k": layout.v.heads, "q": layout.k.heads * groups, "output": layout.q.heads}
    for kind, heads in expected.items():
        piece: Piece = getattr(layout, kind)
        if piece.heads != heads or piece.outputs < piece.heads * piece.block or piece.outputs % piece.block:
            has = f"{piece.projection} has {piece.outputs} numbers in heads of {piece.block}"
            raise _surprise(attention, has, f"{heads} heads")
    return layout


def _surprise(attention: nn.Module, found: str, expected: str) -> HeadsError:
    return HeadsError(f"{type(attention).__name__} is not laid out as expected: {found}, not {expected}")
