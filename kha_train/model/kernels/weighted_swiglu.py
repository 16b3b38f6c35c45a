"""SwiGLU with the routing weight, forward and backward in one pass each: with Triton, and with torch alone.

The weight is applied before the second product: w (a W2) = (w a) W2, on a narrower tensor, and its gradient needs no
expert output.
"""

# N tokens   J experts per token   M = N * J routed copies, sorted by expert   F expert width   X = 2F, gate and up

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.model.kernels.launch import Call, Launch

COLUMNS = 128
LAUNCH = Launch(rows=8, warps=4, stages=1, resident=8)


class Gradients(NamedTuple):
    """The results of the backward: the recomputed activation [M, F], and the gradients of gate and up [M, 2F] and of
    the routing weights [N, J].
    """

    hidden_MF: Tensor
    gate_up_MX: Tensor
    weight_NJ: Tensor


def forward_torch(gate_up_MX: Tensor, weight_NJ: Tensor, order_M: Tensor) -> Tensor:
    """silu(gate) * up * weight, [M, F]; row m has the weight `order_M[m]` of the flattened ones."""
    gate_MF, up_MF = gate_up_MX.chunk(2, dim=-1)
    return functional.silu(gate_MF).mul_(up_MF).mul_(_sorted(weight_NJ, order_M))


def backward_torch(gate_up_MX: Tensor, weight_NJ: Tensor, order_M: Tensor, grad_MF: Tensor) -> Gradients:
    """All of `Gradients` for the gradient `grad_MF` of the activation. The gradient of a weight is summed in its own
    dtype.
    """
    gate_MF, up_MF = gate_up_MX.chunk(2, dim=-1)
    weight_M1, silu_MF = _sorted(weight_NJ, order_M), functional.silu(gate_MF)
    hidden_MF = silu_MF * up_MF
    grad_weight_M = (grad_MF * hidden_MF).sum(dim=-1, dtype=weight_NJ.dtype)
    hidden_MF.mul_(weight_M1)
    weighted_MF = torch.mul(grad_MF, weight_M1, out=torch.empty_like(grad_MF))
    grad_gate_up_MX = torch.empty_like(gate_up_MX)
    grad_gate_MF, grad_up_MF = grad_gate_up_MX.chunk(2, dim=-1)
    torch.mul(weighted_MF, silu_MF, out=grad_up_MF)
    torch.ops.aten.silu_backward(weighted_MF.mul_(up_MF), gate_MF, grad_input=grad_gate_MF)
    grad_weight_M = torch.empty_like(grad_weight_M).scatter_(0, order_M, grad_weight_M)
    return Gradients(hidden_MF, grad_gate_up_MX, grad_weight_M.view_as(weight_NJ))


def forward_triton(gate_up_MX: Tensor, weight_NJ: Tensor, order_M: Tensor) -> Tensor:
    """As `forward_torch`."""
    hidden_MF = gate_up_MX.new_empty(gate_up_MX.shape[0], gate_up_MX.shape[1] // 2)
    forward_call(gate_up_MX, weight_NJ, order_M, hidden_MF).start()
    return hidden_MF


def backward_triton(gate_up_MX: Tensor, weight_NJ: Tensor, order_M: Tensor, grad_MF: Tensor) -> Gradients:
    """As `backward_torch`."""
    found = Gradients(torch.empty_like(grad_MF), torch.empty_like(gate_up_MX), torch.empty_like(weight_NJ))
    backward_call(gate_up_MX, weight_NJ, order_M, grad_MF, found).start()
    return found


def forward_call(gate_up_MX: Tensor, weight_NJ: Tensor, order_M: Tensor, hidden_MF: Tensor) -> Call:
    """The launch that fills `hidden_MF`. All are contiguous."""
    from kha_train.model.kernels.weighted_swiglu_kernels import forward

    rows, width = hidden_MF.shape
    return _call(forward, (gate_up_MX, weight_NJ, order_M, hidden_MF, rows), rows, width)


def backward_call(gate_up_MX: Tensor, weight_NJ: Tensor, order_M: Tensor, grad_MF: Tensor, found: Gradients) -> Call:
    """The launch that fills `found`. All are contiguous."""
    from kha_train.model.kernels.weighted_swiglu_kernels import backward

    rows, width = grad_MF.shape
    return _call(backward, (gate_up_MX, weight_NJ, order_M, grad_MF, *found, rows), rows, width)


def _call(kernel: object, arguments: tuple[Tensor | int, ...], rows: int, width: int) -> Call:
    assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor))
    constants = {"F": width, "ROWS": LAUNCH.rows, "COLUMNS": COLUMNS}
    return Call(kernel, -(-rows // LAUNCH.rows), arguments, constants, LAUNCH)


def _sorted(weight_NJ: Tensor, order_M: Tensor) -> Tensor:
    return weight_NJ.flatten().index_select(0, order_M).unsqueeze(1)
