"""Grouped-query attention. MHA and MQA are the settings kv_heads = query_heads and kv_heads = 1."""

# B batch   T tokens (U: attended tokens)   D model width   H query heads   G key/value heads   K head width

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.base import Attention, RowContext
from kha_train.model.attention.projection import OutputProjection, Projection
from kha_train.model.init import Normal, residual_std
from kha_train.model.norm import build_turning_norm
from kha_train.variants.bases import GroupedQueryOptions


class GroupedQueryAttention(Attention):
    """H query heads share G key/value heads; optional QK-norm before RoPE."""

    folded: ClassVar[dict[str, str]] = {"q": "query", "k": "key", "v": "value"}

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__(config, resolved, layer)
        base = config.attention.base
        assert isinstance(base, GroupedQueryOptions)
        width, head_dim, normal = config.model.hidden_size, base.head_dim, Normal(config.model.init_std)
        self.scale = head_dim**-0.5
        self.query = Projection(width, base.query_heads, head_dim, normal)
        self.key = Projection(width, self.components("k"), head_dim, normal)
        self.value = Projection(width, self.components("v"), head_dim, normal)
        self.output = OutputProjection(base.query_heads, head_dim, width, Normal(residual_std(config)))
        self.query_norm = build_turning_norm(config, resolved, base.query_heads, head_dim)
        self.key_norm = build_turning_norm(config, resolved, base.kv_heads, head_dim)

    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """See `Attention.forward`."""
        folds = self.interaction.folds()
        q_BTHK, k_BUGK, v_BUGK = self.exchange(
            rows, self.query(x_BTD, folds.q), self.key(x_BTD, folds.k), self.value(x_BTD, folds.v)
        )
        q_BTHK = rows.norm_and_turn(self.query_norm, q_BTHK)
        if self.interaction.keeps_projected_keys:
            k_BUGK, v_BUGK = rows.with_past(self, k_BUGK, v_BUGK)
            k_BUGK = rows.attended().norm_and_turn(self.key_norm, self.interaction.read_keys(k_BUGK))
        else:
            k_BUGK = self.interaction.rotated_keys(rows.norm_and_turn(self.key_norm, k_BUGK))
            k_BUGK, v_BUGK = rows.with_past(self, k_BUGK, v_BUGK)
            k_BUGK = self.interaction.read_keys(k_BUGK)
        v_BUGK = self.interaction.read_values(v_BUGK)
        out_BTHK = self.attended(rows, q_BTHK, k_BUGK, v_BUGK, self.scale)
        out_BTD: Tensor = self.output(self.finished(rows, x_BTD, out_BTHK), folds.output)
        return out_BTD
