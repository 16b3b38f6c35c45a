"""The router: which experts a token goes to, and with which weights."""

# N tokens (batch and row flattened)   D model width   E experts   J chosen experts per token (top_k)   M = N * J

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.config.schema import RunConfig
from kha_train.model.init import DeclaredModule, Normal


class Routing(NamedTuple):
    """The router's decision. `weight_NJ` (at least fp32) carries the gradient; `expert_NJ` and `load_E` are int64."""

    expert_NJ: Tensor
    weight_NJ: Tensor
    load_E: Tensor


class Router(DeclaredModule):
    """Sigmoid scores in at least fp32. Experts are chosen by score + selection bias; their weights come from the scores
    alone, divided by their sum (+ 1e-20) and scaled. Dropless: every token keeps its top_k experts."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.top_k, self.scaling = config.moe.top_k, config.moe.routed_scaling
        experts = config.moe.experts
        self.declare_parameter("weight", (experts, config.model.hidden_size), Normal(config.model.init_std))
        fresh = partial(torch.zeros, experts, dtype=torch.float32, device="cpu")
        self.declare_buffer("selection_bias", (experts,), fresh, persistent=True)

    def forward(self, x_ND: Tensor) -> Routing:
        """The experts of every token, their weights, and how many tokens each expert received."""
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        score_NE = functional.linear(x_ND.to(wide), self.weight.to(wide)).sigmoid()
        expert_NJ = (score_NE + self.selection_bias).topk(self.top_k, dim=-1).indices
        chosen_NJ = score_NE.gather(-1, expert_NJ)
        weight_NJ = chosen_NJ / (chosen_NJ.sum(dim=-1, keepdim=True) + 1e-20) * self.scaling
        return Routing(expert_NJ, weight_NJ, count_experts(expert_NJ, self.selection_bias.numel()))


def count_experts(expert_NJ: Tensor, experts: int) -> Tensor:
    """How often each expert occurs, int64 [E]. Unlike bincount it never waits for the device, and integers add up the
    same in any order."""
    flat_M = expert_NJ.flatten()
    load_E = torch.zeros(experts, dtype=torch.int64, device=expert_NJ.device)
    return load_E.scatter_add_(0, flat_M, torch.ones_like(flat_M))
