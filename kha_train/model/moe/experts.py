"""SwiGLU experts with fused weights, dropless. `loop` says what is computed, `grouped` does it in two grouped GEMMs.
`megablocks` (in its own file) is a third way, where that package is installed.

The routing weight is put on the width-F activation before the second GEMM: w (a W2) = (w a) W2, on a smaller tensor,
and expert outputs need not be kept for the backward. Copies go out and come home by gathers in both directions, so the
sum over a token's experts has a fixed order and needs no atomics.
"""

# N tokens   D model width   F expert width   E experts   J experts per token
# M = N * J routed copies, sorted by expert   X = 2F, gate and up side by side

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.model.init import DeclaredModule, Normal, residual_std
from kha_train.model.moe.megablocks import load_kernels, megablocks
from kha_train.model.moe.router import Routing
from kha_train.model.moe.swiglu import weighted_swiglu

# torch publishes the operator in `functional`; older releases that are still admitted only have the private name.
_grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm


class Experts(DeclaredModule):
    """E SwiGLU experts: y = (silu(x W_gate) * (x W_up)) W_down, `gate_up` [E, D, 2F] and `down` [E, F, D].

    Building it raises ConfigError when the backend cannot run: a size it cannot read, a package that is not there.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        experts, width, inner = config.moe.experts, config.model.hidden_size, config.moe.expert_width
        if config.moe.backend == "grouped":
            _require_aligned("model.hidden_size", width)
            _require_aligned("moe.expert_width", inner)
        elif config.moe.backend == "megablocks":
            load_kernels()
        self.run = BACKENDS[config.moe.backend]
        self.declare_parameter("gate_up", (experts, width, 2 * inner), Normal(config.model.init_std))
        self.declare_parameter("down", (experts, inner, width), Normal(residual_std(config)))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of every token's experts, [N, D] in the dtype of `x_ND`."""
        return self.run(x_ND, self.gate_up, self.down, routing)


def loop(x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, routing: Routing) -> Tensor:
    """The oracle: one expert after the other, any dtype. Waits for the device at every expert."""
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EDX.shape[0]):
        token_M, slot_M = (routing.expert_NJ == expert).nonzero(as_tuple=True)
        hidden_MF = weighted_swiglu(x_ND[token_M] @ gate_up_EDX[expert], routing.weight_NJ[token_M, slot_M])
        out_ND = out_ND.index_add(0, token_M, hidden_MF @ down_EFD[expert])
    return out_ND


def grouped(x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, routing: Routing) -> Tensor:
    """Copies sorted by expert, then one grouped GEMM in and one out. fp32 and bf16; counts stay on the device."""
    order_M = routing.expert_NJ.flatten().argsort(stable=True)
    home_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.numel(), device=order_M.device))
    home_NJ = home_M.view_as(routing.expert_NJ)
    ends_E = routing.load_E.cumsum(0).to(torch.int32)
    token_M = order_M.div(routing.expert_NJ.shape[1], rounding_mode="floor")
    weight_M = routing.weight_NJ.flatten()[order_M]
    x_MD = Dispatch.apply(x_ND, token_M, home_NJ)
    hidden_MF = weighted_swiglu(_grouped_mm(x_MD, gate_up_EDX, offs=ends_E), weight_M)
    return Combine.apply(_grouped_mm(hidden_MF, down_EFD, offs=ends_E), token_M, home_NJ)


class Dispatch(torch.autograd.Function):
    """x_ND -> x_MD, a copy of its token for every routed place. The transpose of `Combine`.

    torch's own backward of this gather would add with atomics, in an order that changes from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, home_NJ: Tensor) -> Tensor:
        """Gather by token."""
        ctx.save_for_backward(home_NJ)
        return x_ND[token_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        """Sum of the gradients of a token's copies."""
        (home_NJ,) = ctx.saved_tensors
        return grad_MD[home_NJ].sum(dim=1), None, None


class Combine(torch.autograd.Function):
    """y_MD -> y_ND, the sum of a token's copies in the order of its experts. The transpose of `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, token_M: Tensor, home_NJ: Tensor) -> Tensor:
        """Gather the copies home and add them."""
        ctx.save_for_backward(token_M)
        return y_MD[home_NJ].sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        """Every copy receives its token's gradient."""
        (token_M,) = ctx.saved_tensors
        return grad_ND[token_M], None, None


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Routing], Tensor]] = {
    "grouped": grouped,
    "loop": loop,
    "megablocks": megablocks,
}


def _require_aligned(field: str, size: int) -> None:
    """Grouped GEMM wants rows of a multiple of 16 bytes: 8 numbers of bf16.

    Raises ConfigError otherwise.
    """
    if size % 8:
        raise ConfigError(
            "the grouped expert backend needs rows of a multiple of 16 bytes",
            field=field,
            value=size,
            allowed=f"multiples of 8, such as {size // 8 * 8 or 8} or {size // 8 * 8 + 8}",
            fix="round it, or set moe.backend=loop",
        )
