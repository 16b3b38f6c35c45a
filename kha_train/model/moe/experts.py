"""SwiGLU experts with fused weights, dropless. `loop` is the definition; `grouped` and `megablocks`, in separate files,
compute it faster. All apply the routing weight to the width-F activation before the second product. `parallel` spreads
the experts over ranks, around any of them.
"""

# N tokens   D model width   F expert width   E experts   J experts per token   M copies of one expert
# X = 2F, gate and up side by side

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.config.validate import misaligned
from kha_train.model.device import DTYPES
from kha_train.model.init import DeclaredModule, Normal, residual_std
from kha_train.model.moe.grouped import check_empty_groups, grouped
from kha_train.model.moe.megablocks import load_kernels, run_kernels
from kha_train.model.moe.parallel import ExpertRanks, Run, run_exchanged
from kha_train.model.moe.router import Routing
from kha_train.model.moe.swiglu import weighted_swiglu


class Experts(DeclaredModule):
    """E SwiGLU experts: y = (silu(x W_gate) * (x W_up)) W_down, `gate_up` [E, D, 2F] and `down` [E, F, D].

    `resolved` selects the backend and its kernels. The constructor raises ConfigError when the backend cannot run: an
    unsupported size, or a missing package.
    """

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, config: RunConfig, resolved: Resolved) -> None:
        super().__init__()
        experts, width, inner = config.moe.experts, config.model.hidden_size, config.moe.expert_width
        if problem := misaligned(config):
            raise problem
        self.kernels = resolved.expert_kernels.name
        self.run = BACKENDS[resolved.experts.name](self.kernels)
        self.declare_parameter("gate_up", (experts, width, 2 * inner), Normal(config.model.init_std))
        self.declare_parameter("down", (experts, inner, width), Normal(residual_std(config)))
        self.declare_map("gate_up", -1, (inner, inner))
        self.declare_map("down")

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of every token's experts, [N, D] in the dtype of `x_ND`."""
        return self.run(x_ND, self.gate_up, self.down, routing)

    def spread(self, ranks: ExpertRanks) -> None:
        """Let `ranks` share the experts from now on; the parameters are replaced by those of this rank, see
        `ExpertRanks.own`.
        """
        self.run = partial(run_exchanged, ranks, self.kernels, self.run)


def announce_experts(config: RunConfig, resolved: Resolved, device: torch.device) -> list[str]:
    """The start-up message about experts: backend and kernels, with reasons. `grouped` is checked first. Raises
    ConfigError when it computes wrong numbers here.
    """
    if config.moe.dense_layers >= config.model.layers:
        return []
    experts, kernels = resolved.experts, resolved.expert_kernels
    line = f"experts {experts.name} ({experts.why})"
    if "triton" in (config.engine.kernels, kernels.name):
        line += f" | permute, SwiGLU and combine {kernels.name} ({kernels.why})"
    if experts.name == "grouped":
        check_empty_groups(device, DTYPES[resolved.precision])
    warmup, steps = config.moe.routing_warmup_steps, config.run.steps
    if warmup < steps:
        return [line]
    blends = f"moe.routing_warmup_steps={warmup} does not end within run.steps={steps}"
    return [
        line,
        f"warning: {blends}: random scores influence the choice of experts and weaken the router's gradient to the end",
    ]


def loop(x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, routing: Routing) -> Tensor:
    """The reference: one expert after another, any dtype. Waits for the device at every expert."""
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EDX.shape[0]):
        token_M, slot_M = (routing.expert_NJ == expert).nonzero(as_tuple=True)
        hidden_MF = weighted_swiglu(x_ND[token_M] @ gate_up_EDX[expert], routing.weight_NJ[token_M, slot_M])
        out_ND = out_ND.index_add(0, token_M, hidden_MF @ down_EFD[expert])
    return out_ND


BACKENDS: dict[str, Callable[[str], Run]] = {
    "grouped": lambda kernels: partial(grouped, kernels=kernels),
    "loop": lambda kernels: loop,
    "megablocks": lambda kernels: partial(run_kernels, load_kernels()),
}
"""Expert backend -> what computes the experts, given the kernels beside its products: `torch`, or `triton` where it has
them."""
