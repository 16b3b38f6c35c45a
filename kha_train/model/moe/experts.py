"""SwiGLU experts with fused weights, dropless. `loop` is the definition; `grouped` and `megablocks`, in separate files,
compute it faster. All apply the routing weight to the width-F activation before the second product.
"""

# N tokens   D model width   F expert width   E experts   J experts per token   M copies of one expert
# X = 2F, gate and up side by side

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kha_train.config.schema import RunConfig
from kha_train.config.validate import misaligned
from kha_train.model.init import DeclaredModule, Normal, residual_std
from kha_train.model.moe.grouped import check_empty_groups, grouped
from kha_train.model.moe.megablocks import load_kernels, megablocks
from kha_train.model.moe.router import Routing
from kha_train.model.moe.swiglu import weighted_swiglu


class Experts(DeclaredModule):
    """E SwiGLU experts: y = (silu(x W_gate) * (x W_up)) W_down, `gate_up` [E, D, 2F] and `down` [E, F, D].

    The constructor raises ConfigError when the backend cannot run: an unsupported size, or a missing package.
    """

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        experts, width, inner = config.moe.experts, config.model.hidden_size, config.moe.expert_width
        if problem := misaligned(config):
            raise problem
        if config.moe.backend == "megablocks":
            load_kernels()
        self.run = BACKENDS[config.moe.backend]
        if config.moe.backend == "grouped" and config.engine.kernels == "triton":
            self.run = partial(grouped, kernels="triton")
        self.declare_parameter("gate_up", (experts, width, 2 * inner), Normal(config.model.init_std))
        self.declare_parameter("down", (experts, inner, width), Normal(residual_std(config)))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of every token's experts, [N, D] in the dtype of `x_ND`."""
        return self.run(x_ND, self.gate_up, self.down, routing)


def announce_experts(config: RunConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The start-up message about experts: backend and kernels, with reasons. `grouped` is checked first. Raises
    ConfigError when it computes wrong numbers here.
    """
    if config.moe.dense_layers >= config.model.layers:
        return []
    name, line = config.moe.backend, f"experts {config.moe.backend} (chosen by moe.backend)"
    if config.engine.kernels == "triton":
        why = "triton (chosen by engine.kernels)" if name == "grouped" else f"not triton (for grouped, not {name})"
        line += f" | permute, SwiGLU and combine {why}"
    if name == "grouped":
        check_empty_groups(device, dtype)
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


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Routing], Tensor]] = {
    "grouped": grouped,
    "loop": loop,
    "megablocks": megablocks,
}
