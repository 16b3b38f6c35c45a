"""The mixture-of-experts layer of a block: router and experts."""

# B batch   T tokens   D model width   N = B * T   E experts

from __future__ import annotations

from torch import Tensor, nn

from kha_train.config.schema import RunConfig
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.router import Router


class MoeLayer(nn.Module):
    """Each token through its top_k experts."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output [B, T, D] and `load_E`, the tokens each expert received (int64, no gradient)."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND)
        return self.experts(x_ND, routing).view_as(x_BTD), routing.load_E
