"""Grouped-query attention; MHA and MQA are its settings kv_heads = query_heads and kv_heads = 1."""

# B batch   T tokens   D model width   H query heads   G key/value heads   K head width

from __future__ import annotations

from torch import Tensor

from kha_train.config.options import GroupedQueryOptions
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import BACKENDS
from kha_train.model.attention.base import Attention, RowContext
from kha_train.model.attention.interaction import build_interaction
from kha_train.model.init import Linear, Normal, residual_std
from kha_train.model.norm import build_qk_norm
from kha_train.model.rope import rotate


class GroupedQueryAttention(Attention):
    """H query heads share G key/value heads; optional QK-norm before RoPE."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        base = config.attention.base
        assert isinstance(base, GroupedQueryOptions)
        width, std = config.model.hidden_size, config.model.init_std
        self.heads = base.heads()
        self.attend = BACKENDS[config.attention.backend]
        self.query = Linear(width, base.query_heads * base.head_dim, Normal(std))
        self.key = Linear(width, base.kv_heads * base.head_dim, Normal(std))
        self.value = Linear(width, base.kv_heads * base.head_dim, Normal(std))
        self.output = Linear(base.query_heads * base.head_dim, width, Normal(residual_std(config)))
        self.interaction = build_interaction(config.attention.interaction, self.heads)
        self.query_norm = build_qk_norm(config, base.query_heads, base.head_dim)
        self.key_norm = build_qk_norm(config, base.kv_heads, base.head_dim)

    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """See `Attention.forward`."""
        batch, tokens, _ = x_BTD.shape
        q_BTHK = self.query(x_BTD).view(batch, tokens, self.heads.query_heads, self.heads.key_width)
        k_BTGK = self.key(x_BTD).view(batch, tokens, self.heads.kv_heads, self.heads.key_width)
        v_BTGK = self.value(x_BTD).view(batch, tokens, self.heads.kv_heads, self.heads.value_width)
        q_BTHK, k_BTGK, v_BTGK = self.interaction(q_BTHK, k_BTGK, v_BTGK)
        q_BTHK = rotate(self.query_norm(q_BTHK), rows.rotary)
        k_BTGK = rotate(self.key_norm(k_BTGK), rows.rotary)
        out_BTHK = self.attend(q_BTHK, k_BTGK, v_BTGK, rows.documents)
        return self.output(out_BTHK.flatten(2))
