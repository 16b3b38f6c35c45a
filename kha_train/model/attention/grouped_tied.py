"""Grouped-tied attention (GTA, arXiv 2505.21487): one state per group is the value, and its first half is half of the
key. The other half of the key is one rotary head, shared by all heads.

An interaction on v acts on the tied state before it is split, so that one state is cached and the interaction affects
the keys too. One that acts on values alone (`value_only`) does so after the cache, which keeps the state itself.
"""

# B batch   T tokens (U: attended tokens)   D model width   H query heads   G tied heads   K head width   R = K / 2

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.base import Attention, RowContext
from kha_train.model.attention.projection import OutputProjection, Projection
from kha_train.model.init import Normal, residual_std
from kha_train.model.norm import build_qk_norm
from kha_train.variants.bases import GroupedTiedOptions


class GroupedTiedAttention(Attention):
    """H query heads share G tied states and one rotary key. QK-norm is per head, over the whole query and separately
    over each half of the key, so that the cached rotary half stays one head.
    """

    folded: ClassVar[dict[str, str]] = {"q": "query", "v": "tied", "output": "output"}

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__(config, resolved, layer)
        base = config.attention.base
        assert isinstance(base, GroupedTiedOptions)
        width, head_dim, normal = config.model.hidden_size, base.head_dim, Normal(config.model.init_std)
        self.scale, self.turned = head_dim**-0.5, base.rotary_width()
        self.query = Projection(width, base.query_heads, head_dim, normal)
        self.tied = Projection(width, self.components("v"), head_dim, normal)
        self.rotary_key = Projection(width, 1, self.turned, normal)
        self.output = OutputProjection(base.query_heads, head_dim, width, Normal(residual_std(config)))
        self.query_norm = build_qk_norm(config, base.query_heads, head_dim)
        self.key_norm = build_qk_norm(config, base.kv_heads, head_dim - self.turned)
        self.rotary_key_norm = build_qk_norm(config, 1, self.turned)

    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """See `Attention.forward`."""
        folds, still = self.interaction.folds(), self.heads.key_width - self.turned
        state_BUGK = self.tied(x_BTD, folds.v)
        q_BTHK, _, state_BUGK = self.exchange(rows, self.query(x_BTD, folds.q), state_BUGK, state_BUGK)
        q_BTHK = self.query_norm(q_BTHK)
        q_BTHK = torch.cat((q_BTHK[..., :still], rows.turn(q_BTHK[..., still:])), dim=-1)
        turned_BU1R = rows.turn(self.rotary_key_norm(self.rotary_key(x_BTD)))
        state_BUGK, turned_BU1R = rows.with_past(self, state_BUGK, turned_BU1R)
        state_BUGK = self.interaction.read_keys(state_BUGK)
        still_BUGR = self.key_norm(state_BUGK[..., :still])
        k_BUGK = torch.cat((still_BUGR, turned_BU1R.expand(-1, -1, self.heads.kv_heads, -1)), dim=-1)
        v_BUGK = self.interaction.read_values(state_BUGK)
        out_BTHK = self.attended(rows, q_BTHK, k_BUGK, v_BUGK, self.scale)
        out_BTD: Tensor = self.output(self.finished(rows, x_BTD, out_BTHK), folds.output)
        return out_BTD
