"""The router: selects the experts of a token and their weights, and computes the auxiliary losses."""

# B rows of a micro-batch   T tokens of a row   N = B * T tokens   D model width   E experts   R groups of experts
# J chosen experts per token (top_k)   M = N * J   P = E / R experts of a group

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kha_train.config.schema import RunConfig
from kha_train.model.attention.context import ContextRanks
from kha_train.model.init import DeclaredModule, Normal
from kha_train.model.moe import balance
from kha_train.model.moe.balance import (
    AUXILIARY_LOSS,
    Z_LOSS,
    batch_balance_loss,
    expected_balance_loss,
    sequence_balance_loss,
)
from kha_train.model.moe.warmup import standard_normal
from kha_train.model.observed import UNREAD, Report


class Routing(NamedTuple):
    """The router's decision. `weight_NJ` (at least fp32) carries the gradient; `expert_NJ` and `load_E` are int64.

    `balance_sum` and `z_sum` are the auxiliary losses summed over the tokens, scalars with gradient: None where their
    weight is 0, and outside training.
    """

    expert_NJ: Tensor
    weight_NJ: Tensor
    load_E: Tensor
    balance_sum: Tensor | None = None
    z_sum: Tensor | None = None


RUN_STATE = ("previous_share", "steps_done")
"""Buffers that belong to the run and not to the model: a new run that takes these weights resets them."""


class Router(DeclaredModule):
    """Sigmoid or softmax scores in at least fp32, or in bf16 (`moe.router_precision`). Experts are chosen by score +
    selection bias, within the best groups; their weights come from the scores alone. Dropless: every token keeps its
    top_k experts.

    Buffers: `selection_bias` [E], updated after every step; `previous_share` [E], the loads of the last step over their
    mean (1 before the first); `steps_done` [1], which the routing warm-up counts.
    """

    weight: nn.Parameter
    selection_bias: Tensor
    previous_share: Tensor
    steps_done: Tensor
    layer_1: Tensor

    def __init__(self, config: RunConfig, layer: int) -> None:
        super().__init__()
        self.moe, self.seed = config.moe, config.routing_seed
        auxiliary = (AUXILIARY_LOSS,) if config.moe.auxiliary_loss.weight else ()
        self.metrics = (*balance.METRICS, *auxiliary, *((Z_LOSS,) if config.moe.z_loss_weight else ()))
        experts = config.moe.experts
        self.declare_parameter("weight", (experts, config.model.hidden_size), Normal(config.model.init_std))
        self._declare_state("selection_bias", experts, 0.0)
        if config.moe.auxiliary_loss.weight and config.moe.auxiliary_loss.scope == "previous_step":
            self._declare_state("previous_share", experts, 1.0)
        if config.moe.routing_warmup_steps:
            self._declare_state("steps_done", 1, 0.0)
            # A tensor, so that the layers share their compiled code.
            number = partial(torch.full, (1,), float(layer), dtype=torch.float32, device="cpu")
            self.declare_buffer("layer_1", (1,), number, persistent=False)

    def forward(
        self,
        x_ND: Tensor,
        samples_B: Tensor | None = None,
        real_N: Tensor | None = None,
        places: int = 0,
        report: Report = UNREAD,
        context: ContextRanks | None = None,
    ) -> Routing:
        """The experts of every token, their weights, and the number of tokens of each expert.

        `samples_B` (int64) are the sample numbers of the rows, which key the random scores of the warm-up; without it
        all tokens are one row, number 0. The tokens fill the rows, or lie at `real_N` (int64) of the rows' `places`.
        `report` takes the values of metrics. With `context` the rows are parts of rows that ranks share.
        """
        if samples_B is None:
            samples_B = torch.zeros(1, dtype=torch.int64, device=x_ND.device)
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        narrow = torch.bfloat16 if self.moe.router_precision == "bf16" else wide
        logit_NE = functional.linear(x_ND.to(narrow), self.weight.to(narrow)).to(wide)
        score_NE = self._score(self._warmed_up(logit_NE, samples_B, real_N, places, context).to(narrow)).to(wide)
        expert_NJ = self._choose(score_NE.detach() + self.selection_bias)
        weight_NJ = score_NE.gather(-1, expert_NJ)
        if self.moe.renormalize:
            weight_NJ = weight_NJ / (weight_NJ.sum(dim=-1, keepdim=True) + 1e-20)
        load_E = count_experts(expert_NJ, self.moe.experts)
        balance_sum = z_sum = None
        if self.training and self.moe.auxiliary_loss.weight:
            balance_sum = self._balance_loss(score_NE, expert_NJ, load_E, samples_B.numel(), real_N, places, context)
        if self.training and self.moe.z_loss_weight:
            z_sum = logit_NE.logsumexp(dim=-1).square().sum()
        return Routing(expert_NJ, weight_NJ * self.moe.routed_scaling, load_E, balance_sum, z_sum)

    def finish_step(self, share_E: Tensor) -> None:
        """Record that a step was applied, and its loads over their mean."""
        if hasattr(self, "previous_share"):
            self.previous_share.copy_(share_E)
        if hasattr(self, "steps_done"):
            self.steps_done.add_(1.0)

    def _declare_state(self, name: str, size: int, value: float) -> None:
        fresh = partial(torch.full, (size,), value, dtype=torch.float32, device="cpu")
        self.declare_buffer(name, (size,), fresh, persistent=True)

    def _score(self, logit_NE: Tensor) -> Tensor:
        return logit_NE.sigmoid() if self.moe.score == "sigmoid" else logit_NE.softmax(dim=-1)

    def _warmed_up(
        self,
        logit_NE: Tensor,
        samples_B: Tensor,
        real_N: Tensor | None,
        places: int,
        context: ContextRanks | None,
    ) -> Tensor:
        """a s + (1 - a) (mu + sigma eps), a = steps done / warm-up steps: at first the choice is random, with the same
        mean and spread over the experts.
        """
        if not (self.training and self.moe.routing_warmup_steps):
            return logit_NE
        blend = (self.steps_done / self.moe.routing_warmup_steps).clamp(max=1.0)
        shape = logit_NE.shape if real_N is None else torch.Size((places, logit_NE.shape[1]))
        first = context.rank * (shape[0] // samples_B.numel()) if context else 0
        noise_NE = standard_normal(self.seed, self.layer_1.long(), self.steps_done, samples_B, shape, first)
        noise_NE = noise_NE if real_N is None else noise_NE.index_select(0, real_N)
        spread_N1, mean_N1 = torch.std_mean(logit_NE.detach(), dim=-1, keepdim=True, correction=0)
        return blend * logit_NE + (1.0 - blend) * (mean_N1 + spread_N1 * noise_NE)

    def _choose(self, choice_NE: Tensor) -> Tensor:
        """The top_k experts of each token by score + bias. A group is ranked by the sum of its two best experts."""
        groups = self.moe.expert_groups
        if groups > 1:
            choice_NRP = choice_NE.unflatten(-1, (groups, -1))
            best_NR = choice_NRP.topk(min(2, choice_NRP.shape[-1]), dim=-1).values.sum(dim=-1)
            open_NR = torch.zeros_like(best_NR, dtype=torch.bool)
            open_NR.scatter_(-1, best_NR.topk(self.moe.top_groups, dim=-1).indices, True)
            choice_NE = choice_NRP.masked_fill(~open_NR.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_NE.topk(self.moe.top_k, dim=-1).indices

    def _balance_loss(
        self,
        score_NE: Tensor,
        expert_NJ: Tensor,
        load_E: Tensor,
        rows: int,
        real_N: Tensor | None,
        places: int,
        context: ContextRanks | None,
    ) -> Tensor:
        share_NE = score_NE
        if self.moe.score == "sigmoid":
            share_NE = score_NE / (score_NE.sum(dim=-1, keepdim=True) + 1e-20)
        match self.moe.auxiliary_loss.scope:
            case "sequence":
                return sequence_balance_loss(share_NE, expert_NJ, rows, real_N, places, context)
            case "previous_step":
                return expected_balance_loss(share_NE, self.previous_share)
            case "micro_batch":
                return batch_balance_loss(share_NE, context.total(load_E) if context else load_E)


def count_experts(expert_NJ: Tensor, experts: int) -> Tensor:
    """The number of occurrences of each expert, int64 [E]. Unlike bincount it never waits for the device, and integer
    sums do not depend on the order.
    """
    flat_M = expert_NJ.flatten()
    load_E = torch.zeros(experts, dtype=torch.int64, device=expert_NJ.device)
    return load_E.scatter_add_(0, flat_M, torch.ones_like(flat_M))
