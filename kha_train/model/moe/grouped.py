"""The `grouped` expert backend as one operator: copies sorted by expert, one grouped GEMM in and one out, and one pass
over memory for each step in between.

The backward keeps, besides the caller's tensors, the output [M, 2F] of the first product. It recomputes the copies of
the input and the activation, and never needs expert outputs. Nothing waits for the device.
"""

# N tokens   D model width   F expert width   E experts   J experts per token
# M = N * J routed copies, sorted by expert   X = 2F, gate and up side by side

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.errors import ConfigError, Settings
from kha_train.model.host import spare_the_compiler
from kha_train.model.kernels import movement, weighted_swiglu
from kha_train.model.kernels.weighted_swiglu import Gradients
from kha_train.model.moe.router import Routing

# torch publishes the operator in `functional`; older supported releases only have the private name.
grouped_product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
"""Rows of the left operand times the matrix of their group: `offs` (int32) are the ends of the groups."""

TILE_ROWS = 128
"""Rows per output tile of the grouped GEMM on Hopper: an expert's copies are rounded up to it."""


class Kernels(NamedTuple):
    """The functions for everything except the products."""

    permute: Callable[[Tensor, Tensor, Tensor], Tensor]
    combine: Callable[[Tensor, Tensor], Tensor]
    activate: Callable[[Tensor, Tensor, Tensor], Tensor]
    activate_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Gradients]


KERNELS = {
    "torch": Kernels(
        movement.permute_torch,
        movement.combine_torch,
        weighted_swiglu.forward_torch,
        weighted_swiglu.backward_torch,
    ),
    "triton": Kernels(
        movement.permute_triton,
        movement.combine_triton,
        weighted_swiglu.forward_triton,
        weighted_swiglu.backward_triton,
    ),
}


class Placement(NamedTuple):
    """The positions of the copies: `order_M` [M] is the copy (token * J + choice) at each sorted position, `home_NJ`
    the sorted position of each copy, both int64, and `ends_E` (int32) the end of each expert's copies.
    """

    order_M: Tensor
    home_NJ: Tensor
    ends_E: Tensor


def place(expert_NJ: Tensor, load_E: Tensor) -> Placement:
    """Sort copies by expert, and by number within an expert: the same on every machine. Counts stay on the device."""
    # A radix sort passes over every byte of its keys: two bytes instead of eight.
    assert len(load_E) <= 2**15, len(load_E)
    order_M = expert_NJ.flatten().to(torch.int16).argsort(stable=True)
    numbers_M = torch.arange(order_M.numel(), device=order_M.device)
    home_M = torch.empty_like(order_M).scatter_(0, order_M, numbers_M)
    return Placement(order_M, home_M.view_as(expert_NJ), load_E.cumsum(0).to(torch.int32))


def grouped(x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, routing: Routing, kernels: str = "torch") -> Tensor:
    """The weighted sum of every token's experts, [N, D]. fp32 and bf16. `kernels`: `torch` or `triton`."""
    placement = place(routing.expert_NJ, routing.load_E)
    x_ND, weight_NJ = x_ND.contiguous(), routing.weight_NJ.contiguous()
    out_ND: Tensor = grouped_experts(x_ND, gate_up_EDX, down_EFD, weight_NJ, *placement, kernels)[0]
    return out_ND


def run_forward(
    x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, weight_NJ: Tensor, placement: Placement, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """The output [N, D], and the first product [M, 2F] for `run_backward`."""
    order_M, home_NJ, ends_E = placement
    if not order_M.numel():
        # A micro-batch that is all padding: kernels do not support products without rows.
        return torch.zeros_like(x_ND), x_ND.new_empty(0, gate_up_EDX.shape[2])
    gate_up_MX = grouped_product(kernels.permute(x_ND, order_M, home_NJ), gate_up_EDX, offs=ends_E)
    hidden_MF = kernels.activate(gate_up_MX, weight_NJ, order_M)
    return kernels.combine(grouped_product(hidden_MF, down_EFD, offs=ends_E), home_NJ), gate_up_MX


def run_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_EDX: Tensor,
    down_EFD: Tensor,
    weight_NJ: Tensor,
    placement: Placement,
    gate_up_MX: Tensor,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, both matrices and routing weights. Tensors of M rows are freed as soon as they are used."""
    order_M, home_NJ, ends_E = placement
    if not order_M.numel():
        grad_x_ND, grad_gate_up_EDX, grad_down_EFD, grad_weight_NJ = map(
            torch.zeros_like, (x_ND, gate_up_EDX, down_EFD, weight_NJ)
        )
        return grad_x_ND, grad_gate_up_EDX, grad_down_EFD, grad_weight_NJ
    grad_MD = kernels.permute(grad_ND, order_M, home_NJ)
    grad_MF = grouped_product(grad_MD, down_EFD.transpose(1, 2), offs=ends_E)
    hidden_MF, grad_MX, grad_weight_NJ = kernels.activate_backward(gate_up_MX, weight_NJ, order_M, grad_MF)
    grad_down_EFD = grouped_product(hidden_MF.t(), grad_MD, offs=ends_E)
    del grad_MD, grad_MF, hidden_MF
    x_MD = kernels.permute(x_ND, order_M, home_NJ)
    grad_gate_up_EDX = grouped_product(x_MD.t(), grad_MX, offs=ends_E)
    del x_MD
    grad_MD = grouped_product(grad_MX, gate_up_EDX.transpose(1, 2), offs=ends_E)
    return kernels.combine(grad_MD, home_NJ), grad_gate_up_EDX, grad_down_EFD, grad_weight_NJ


@torch.library.custom_op("kha_train::grouped_experts", mutates_args=())
def grouped_experts(
    x_ND: Tensor,
    gate_up_EDX: Tensor,
    down_EFD: Tensor,
    weight_NJ: Tensor,
    order_M: Tensor,
    home_NJ: Tensor,
    ends_E: Tensor,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """`run_forward` as one node of a graph. The second output is only for the backward and has no gradient."""
    placement = Placement(order_M, home_NJ, ends_E)
    return run_forward(x_ND, gate_up_EDX, down_EFD, weight_NJ, placement, KERNELS[kernels])


@torch.library.custom_op("kha_train::grouped_experts_backward", mutates_args=())
def grouped_experts_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_EDX: Tensor,
    down_EFD: Tensor,
    weight_NJ: Tensor,
    order_M: Tensor,
    home_NJ: Tensor,
    ends_E: Tensor,
    gate_up_MX: Tensor,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`run_backward` as one node of a graph."""
    placement = Placement(order_M, home_NJ, ends_E)
    given = (x_ND, gate_up_EDX, down_EFD, weight_NJ, placement, gate_up_MX)
    return run_backward(grad_ND, *given, KERNELS[kernels])


@grouped_experts.register_fake
def _(
    x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, weight_NJ: Tensor, order_M: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(order_M.shape[0], gate_up_EDX.shape[2])


@grouped_experts_backward.register_fake
def _(
    grad_ND: Tensor, x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, weight_NJ: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = torch.empty_like
    return empty(x_ND), empty(gate_up_EDX), empty(down_EFD), empty(weight_NJ)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernels = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_ND: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads = grouped_experts_backward(grad_ND, *ctx.saved_tensors, ctx.kernels)
    return *grads, None, None, None, None


torch.library.register_autograd("kha_train::grouped_experts", _backward, setup_context=_keep)
for _operator in (grouped_experts, grouped_experts_backward):
    for _kernel in _operator._backend_fns.values():
        spare_the_compiler(_kernel)


def check_empty_groups(device: torch.device, dtype: torch.dtype) -> None:
    """Check that an expert that no token chose gets a gradient of zeros; torch's product gave others on some devices
    (pytorch issue 172439, B200). Raises ConfigError where it does.
    """
    rows_MD = torch.ones(32, 64, device=device, dtype=dtype)
    ends_E = torch.tensor([16, 16, 32], dtype=torch.int32, device=device)
    expected_EDX = torch.tensor([16.0, 0.0, 16.0], device=device, dtype=dtype).view(3, 1, 1).expand(3, 64, 64)
    # Unwritten memory keeps its old content: memory that was just freed is allocated again.
    torch.full_like(expected_EDX, float("nan"), memory_format=torch.contiguous_format)
    if not torch.equal(grouped_product(rows_MD.t(), rows_MD, offs=ends_E), expected_EDX):
        raise ConfigError(
            f"computes wrong gradients for experts without tokens with torch {torch.__version__} on this {device.type}",
            field="moe.backend",
            value="grouped",
            fix=Settings("moe.backend=loop"),
        )


def tile_padding(load_E: Tensor, tile_rows: int = TILE_ROWS) -> float:
    """Rows that a grouped GEMM computes over actual rows: each expert's rows are rounded up to whole tiles."""
    tiles_E = (load_E + tile_rows - 1) // tile_rows
    return float(tiles_E.sum() * tile_rows / load_E.sum())
