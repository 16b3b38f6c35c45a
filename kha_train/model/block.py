"""One layer of the decoder: attention, then experts, each normalised and added to the residual stream."""

# B batch   T tokens   D model width   E experts

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kha_train.config.schema import RunConfig
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.moe.layer import MoeLayer
from kha_train.model.norm import RmsNorm


class BlockStats(NamedTuple):
    """What a block reports about its forward: returned, never counted on the side, for recomputation runs a forward
    twice. `load_E` (int64, no gradient) is the tokens each expert received."""

    load_E: Tensor


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.model.hidden_size, config.model.norm_eps)
        self.attention = build_attention(config)
        self.moe_norm = RmsNorm(config.model.hidden_size, config.model.norm_eps)
        self.moe = MoeLayer(config)

    def forward(self, x_BTD: Tensor, rows: RowContext) -> tuple[Tensor, BlockStats]:
        """The residual stream after this layer, and its statistics."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rows)
        y_BTD, load_E = self.moe(self.moe_norm(x_BTD))
        return x_BTD + y_BTD, BlockStats(load_E)
