"""The mixture-of-experts layer of a block: router, routed experts, experts that every token passes."""

# B batch   T tokens   D model width   N = B * T   E experts

from __future__ import annotations

from torch import Tensor, nn

from kha_train.config.schema import RunConfig
from kha_train.model.feed_forward import SwiGlu
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.router import Router, Routing


class MoeLayer(nn.Module):
    """Each token through its top_k experts, and through the shared ones if there are any."""

    def __init__(self, config: RunConfig, layer: int) -> None:
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)
        shared_width = config.moe.shared_experts * config.moe.expert_width
        self.shared = SwiGlu(config, shared_width) if shared_width else None

    def forward(self, x_BTD: Tensor, samples_B: Tensor) -> tuple[Tensor, Routing]:
        """The layer's output [B, T, D], and what the router decided for the rows `samples_B`."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND, samples_B)
        y_BTD = self.experts(x_ND, routing).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), routing
