"""The gated perceptron shared by heads (KHA eq 9), as one operator of torch: `kha_train::knocking_mlp`.

Only its inputs are kept for the backward, which recomputes up and gate, writes [dU, dG] once, and leaves the rest to
matrix products: dX = [dU, dG] [W_up, W_gate]^T and [dW_up, dW_gate] = X^T [dU, dG]. The order of every sum is fixed.
"""

# B batch   T tokens   H heads of one kind   K head width   L = 2 K

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kha_train.model.kernels.launch import Call, Launch, as_rows, persistent_programs

FORWARD = {16: Launch(64, 4, 1, 8), 32: Launch(64, 4, 1, 8), 64: Launch(64, 4, 1, 5), 128: Launch(64, 8, 1, 2)}
BACKWARD = {16: Launch(64, 4, 1, 8), 32: Launch(64, 4, 1, 8), 64: Launch(64, 4, 1, 4), 128: Launch(64, 8, 1, 2)}
"""Launch options by head width, without W_down, which when folded is part of the output projection."""
FORWARD_WITH_DOWN = FORWARD | {128: Launch(64, 4, 1, 2)}
BACKWARD_WITH_DOWN = BACKWARD | {32: Launch(64, 4, 1, 7), 64: Launch(64, 4, 1, 3), 128: Launch(64, 4, 1, 2)}


@torch.library.custom_op(
    "kha_train::knocking_mlp", mutates_args=(), schema="(Tensor x, Tensor up, Tensor gate, Tensor? down) -> Tensor"
)
def knocking_mlp(x_BTHK: Tensor, up_KK: Tensor, gate_KK: Tensor, down_KK: Tensor | None) -> Tensor:
    """`heads.maths.perceptron` in one kernel, for matrices that all heads share: [B, T, H, K] with any strides ->
    contiguous, in the same dtype.
    """
    out_BTHK = _empty(x_BTHK, x_BTHK.shape[-1])
    forward_call(x_BTHK, up_KK, gate_KK, down_KK, out_BTHK).start()
    return out_BTHK


@torch.library.custom_op(
    "kha_train::knocking_mlp_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor up, Tensor gate, Tensor? down, Tensor grad) -> Tensor[]",
)
def knocking_mlp_backward(
    x_BTHK: Tensor, up_KK: Tensor, gate_KK: Tensor, down_KK: Tensor | None, grad_BTHK: Tensor
) -> list[Tensor]:
    """The gradients of `x_BTHK` and of each given matrix."""
    width = x_BTHK.shape[-1]
    grad_hidden_BTHK = (grad_BTHK if down_KK is None else grad_BTHK @ down_KK.T).contiguous()
    both_BTHL, hidden_BTHK = _empty(x_BTHK, 2 * width), None if down_KK is None else _empty(x_BTHK, width)
    backward_call(x_BTHK, up_KK, gate_KK, grad_hidden_BTHK, both_BTHL, hidden_BTHK).start()
    rows = both_BTHL.view(-1, 2 * width)
    grad_x_BTHK = (rows @ torch.cat((up_KK, gate_KK), dim=1).T).view(x_BTHK.shape)
    grads = _product(x_BTHK.reshape(-1, width).T, rows).to(up_KK.dtype)
    answer = [grad_x_BTHK, grads[:, :width].contiguous(), grads[:, width:].contiguous()]
    if hidden_BTHK is not None:
        answer.append(_product(hidden_BTHK.view(-1, width).T, grad_BTHK.reshape(-1, width)).to(up_KK.dtype))
    return answer


def forward_call(x_BTHK: Tensor, up_KK: Tensor, gate_KK: Tensor, down_KK: Tensor | None, out_BTHK: Tensor) -> Call:
    """The kernel that fills `out_BTHK`."""
    from kha_train.model.kernels.knocking_mlp_kernels import forward

    table = FORWARD if down_KK is None else FORWARD_WITH_DOWN
    matrices = [None if matrix is None else matrix.contiguous() for matrix in (up_KK, gate_KK, down_KK)]
    return _call(forward, table, x_BTHK, [*matrices, out_BTHK], {"DOWN": down_KK is not None})


def backward_call(
    x_BTHK: Tensor, up_KK: Tensor, gate_KK: Tensor, grad_BTHK: Tensor, both_BTHL: Tensor, hidden_BTHK: Tensor | None
) -> Call:
    """The kernel that fills `both_BTHL` with [dU, dG] and `hidden_BTHK`, if given, with the input of W_down."""
    from kha_train.model.kernels.knocking_mlp_kernels import backward

    table = BACKWARD if hidden_BTHK is None else BACKWARD_WITH_DOWN
    others = [up_KK.contiguous(), gate_KK.contiguous(), grad_BTHK, both_BTHL, hidden_BTHK]
    return _call(backward, table, x_BTHK, others, {"HIDDEN": hidden_BTHK is not None})


def _call(
    kernel: object, table: dict[int, Launch], x_BTHK: Tensor, others: list[Tensor | None], flags: dict[str, bool]
) -> Call:
    x_BTHK = as_rows(x_BTHK)
    *outer, heads, width = x_BTHK.shape
    launch, rows = table[width], torch.Size(outer).numel() * heads
    programs = persistent_programs(x_BTHK.device, -(-rows // launch.rows), launch)
    arguments = (x_BTHK, *others, rows, *x_BTHK.stride()[1:3])
    return Call(kernel, programs, arguments, {"HEADS": heads, "K": width, "ROWS": launch.rows} | flags, launch)


def _empty(x_BTHK: Tensor, width: int) -> Tensor:
    return x_BTHK.new_empty((*x_BTHK.shape[:-1], width))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in at least fp32, over all rows of a micro-batch, without intermediate rounding."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


@knocking_mlp.register_fake
def _(x_BTHK: Tensor, up_KK: Tensor, gate_KK: Tensor, down_KK: Tensor | None) -> Tensor:
    return _empty(x_BTHK, x_BTHK.shape[-1])


@knocking_mlp_backward.register_fake
def _(x_BTHK: Tensor, up_KK: Tensor, gate_KK: Tensor, down_KK: Tensor | None, grad_BTHK: Tensor) -> list[Tensor]:
    matrices = [up_KK, gate_KK] if down_KK is None else [up_KK, gate_KK, down_KK]
    return [
        _empty(x_BTHK, x_BTHK.shape[-1]),
        *(torch.empty_like(m, memory_format=torch.contiguous_format) for m in matrices),
    ]


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
    grads = knocking_mlp_backward(*ctx.saved_tensors, grad_BTHK)
    return (*grads, None) if len(grads) == 3 else tuple(grads)


knocking_mlp.register_autograd(_differentiate, setup_context=_keep)
