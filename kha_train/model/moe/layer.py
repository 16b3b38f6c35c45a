"""The mixture-of-experts layer of a block: router, routed experts, shared experts."""

# B batch   T places of a row   D model width   N = B * T   R places that hold a token

from __future__ import annotations

import torch
from torch import Tensor, nn

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.context import ContextRanks
from kha_train.model.feed_forward import SwiGlu
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.router import Router, Routing
from kha_train.model.observed import UNREAD, Report


class MoeLayer(nn.Module):
    """Each token passes its top_k experts, and the shared ones if there are any. Padding passes none."""

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int) -> None:
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config, resolved)
        shared_width = config.moe.shared_experts * config.moe.expert_width
        self.shared = SwiGlu(config, shared_width) if shared_width else None

    def forward(
        self,
        x_BTD: Tensor,
        samples_B: Tensor,
        real_R: Tensor | None = None,
        report: Report = UNREAD,
        context: ContextRanks | None = None,
    ) -> tuple[Tensor, Routing]:
        """The layer's output [B, T, D], and the router's decision for the rows `samples_B`.

        With `real_R` (int64, ascending, of the flattened B*T places) only the tokens there are routed and computed, in
        this order; the output is 0 elsewhere. `report` takes the values of metrics. With `context` the tokens are this
        rank's part of the rows.
        """
        x_ND = x_BTD.flatten(0, 1)
        if real_R is None:
            routing = self.router(x_ND, samples_B, report=report.of_tokens(), context=context)
            y_BTD = self.experts(x_ND, _choice(routing)).view_as(x_BTD)
            return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD, report), routing
        x_RD = x_ND.index_select(0, real_R)
        routing = self.router(x_RD, samples_B, real_R, x_ND.shape[0], report.of_tokens(), context)
        y_RD = self.experts(x_RD, _choice(routing))
        y_RD = y_RD if self.shared is None else y_RD + self.shared(x_RD, report.of_tokens())
        return torch.zeros_like(x_ND).index_copy(0, real_R, y_RD).view_as(x_BTD), routing


def _choice(routing: Routing) -> Routing:
    """`routing` without its losses. Under ZeRO 3 DeepSpeed frees a module's parameters in the backward when all inputs
    of the module that require a gradient have theirs. Experts do not use the losses: these gradients never come.
    """
    return Routing(routing.expert_NJ, routing.weight_NJ, routing.load_E)
