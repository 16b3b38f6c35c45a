"""RMSNorm of every head and its rotation, as one operator of torch: `kha_train::norm_rotate`.

Only its inputs are kept for the backward. Each program sums the weight's gradient over its own rows; then programs are
summed in order: always the same bits on one kind of device.
"""

# B batch   T tokens   H heads   K head width   R rotation planes: at most K / 2   P programs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.model.kernels.launch import Call, Launch, as_rows, persistent_programs
from kha_train.model.rope import Rotary, rotate

TILE_NUMBERS = {"forward": 4096, "backward": 1024}
"""Numbers of x per tile: more rows need more registers."""
RESIDENT = {"forward": 5, "backward": 8}
WARPS, STAGES = 4, 1


def plain_norm_rotate(x_BTHK: Tensor, weight_K: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, then rotated by the token's angles: the definition."""
    return rotate(functional.rms_norm(x_BTHK, weight_K.shape, weight_K, eps), Rotary(cos_BTR, sin_BTR))


@torch.library.custom_op(
    "kha_train::norm_rotate",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def norm_rotate(x_BTHK: Tensor, weight_K: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, eps: float) -> Tensor:
    """`plain_norm_rotate` in one kernel, rounded once at its end: [B, T, H, K] with any strides -> contiguous, in the
    same dtype; the tables are fp32."""
    out_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    forward_call(x_BTHK, weight_K, cos_BTR, sin_BTR, out_BTHK, eps).start()
    return out_BTHK


@torch.library.custom_op(
    "kha_train::norm_rotate_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, Tensor grad, float eps) -> (Tensor, Tensor)",
)
def norm_rotate_backward(
    x_BTHK: Tensor, weight_K: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, grad_BTHK: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of `x_BTHK` and `weight_K`."""
    grad_x_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    call, shares_PK = backward_call(x_BTHK, weight_K, cos_BTR, sin_BTR, grad_BTHK, grad_x_BTHK, eps)
    call.start()
    return grad_x_BTHK, shares_PK.sum(0).to(weight_K.dtype)


def forward_call(
    x_BTHK: Tensor, weight_K: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, out_BTHK: Tensor, eps: float
) -> Call:
    """The kernel that fills `out_BTHK`."""
    from kha_train.model.kernels.norm_rotate_kernels import forward

    x_BTHK = as_rows(x_BTHK)
    launch, programs, constants = _geometry(x_BTHK, cos_BTR, eps, "forward")
    tables = (weight_K.contiguous(), cos_BTR.contiguous(), sin_BTR.contiguous())
    token_stride, head_stride = x_BTHK.stride()[1:3]
    arguments = (x_BTHK, *tables, out_BTHK, _rows(x_BTHK), token_stride, head_stride)
    return Call(forward, programs, arguments, constants, launch)


def backward_call(
    x_BTHK: Tensor,
    weight_K: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    grad_BTHK: Tensor,
    grad_x_BTHK: Tensor,
    eps: float,
) -> tuple[Call, Tensor]:
    """The kernel that fills `grad_x_BTHK`, and the tensor it fills with each program's share of the weight's
    gradient.
    """
    from kha_train.model.kernels.norm_rotate_kernels import backward

    x_BTHK = as_rows(x_BTHK)
    grad_BTHK = grad_BTHK if grad_BTHK.stride(3) == 1 else grad_BTHK.contiguous()
    launch, programs, constants = _geometry(x_BTHK, cos_BTR, eps, "backward")
    shares_PK = x_BTHK.new_empty((programs, x_BTHK.shape[-1]), dtype=torch.promote_types(x_BTHK.dtype, torch.float32))
    tables = (weight_K.contiguous(), cos_BTR.contiguous(), sin_BTR.contiguous())
    results = (grad_BTHK, grad_x_BTHK, shares_PK, _rows(x_BTHK))
    strides: tuple[int, ...] = (*x_BTHK.stride()[1:3], x_BTHK.shape[1], *grad_BTHK.stride()[:3])
    arguments: tuple[Tensor | int, ...] = (x_BTHK, *tables, *results, *strides)
    return Call(backward, programs, arguments, constants, launch), shares_PK


def _geometry(x_BTHK: Tensor, cos_BTR: Tensor, eps: float, direction: str) -> tuple[Launch, int, dict[str, float]]:
    heads, width = x_BTHK.shape[2:]
    assert cos_BTR.shape[:2] == x_BTHK.shape[:2], "the tables have one row per token"
    launch = Launch(TILE_NUMBERS[direction] // width, WARPS, STAGES, RESIDENT[direction])
    programs = persistent_programs(x_BTHK.device, -(-_rows(x_BTHK) // launch.rows), launch)
    planes = cos_BTR.shape[-1]
    return launch, programs, {"HEADS": heads, "K": width, "PLANES": planes, "EPS": eps, "ROWS": launch.rows}


def _rows(x_BTHK: Tensor) -> int:
    return x_BTHK.shape[:3].numel()


@norm_rotate.register_fake
def _(x_BTHK: Tensor, weight_K: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, eps: float) -> Tensor:
    return x_BTHK.new_empty(x_BTHK.shape)


@norm_rotate_backward.register_fake
def _(
    x_BTHK: Tensor, weight_K: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, grad_BTHK: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x_BTHK.new_empty(x_BTHK.shape), weight_K.new_empty(weight_K.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
    return *norm_rotate_backward(*ctx.saved_tensors, grad_BTHK, ctx.eps), None, None, None


norm_rotate.register_autograd(_differentiate, setup_context=_keep)
