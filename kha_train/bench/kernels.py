"""Compiles every kernel for Hopper on any Linux machine and reports its resources. Needs no GPU and measures no time.

Kernels are compiled from the calls of their operators, with tensors on the meta device.
"""

# B rows   T tokens   H heads   K head width   R rotation planes
# N tokens   D model width   J experts per token   M = N * J copies   F expert width   X = 2F

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kha_train.config.resolve import interpreted
from kha_train.errors import ConfigError
from kha_train.model.kernels import knocking_mlp, movement, norm_rotate, weighted_swiglu
from kha_train.model.kernels.compiler import CAPABILITY, Compiled, compile_call
from kha_train.model.kernels.launch import Call
from kha_train.variants.interactions import KERNEL_WIDTHS

B, T = 2, 8192


def perceptron_calls(width: int, down: bool) -> dict[str, Call]:
    """The perceptron shared by 4 heads, folded or with W_down."""
    x_BTHK, matrix_KK, both = _like(B, T, 4, width), _like(width, width), _like(B, T, 4, 2 * width)
    name = f"KHA-MLP{' with W_down' if down else ''}, K = {width}"
    return {
        f"{name}, forward": knocking_mlp.forward_call(
            x_BTHK, matrix_KK, matrix_KK, matrix_KK if down else None, x_BTHK
        ),
        f"{name}, backward": knocking_mlp.backward_call(
            x_BTHK, matrix_KK, matrix_KK, x_BTHK, both, x_BTHK if down else None
        ),
    }


def norm_calls(width: int, planes: int) -> dict[str, Call]:
    """Norm and rotation of 32 heads."""
    x_BTHK, weight_K, table_BTR = _like(B, T, 32, width), _like(width), _like(B, T, planes, dtype=torch.float32)
    name = f"norm and rotation, K = {width}, R = {planes}"
    backward, _ = norm_rotate.backward_call(x_BTHK, weight_K, table_BTR, table_BTR, x_BTHK, x_BTHK, 1e-6)
    return {
        f"{name}, forward": norm_rotate.forward_call(x_BTHK, weight_K, table_BTR, table_BTR, x_BTHK, 1e-6),
        f"{name}, backward": backward,
    }


def expert_calls(width: int, top_k: int, inner: int) -> dict[str, Call]:
    """What moves and scales the copies of B * T tokens: `top_k` experts a token, `inner` wide."""
    tokens = B * T
    home_NJ, order_M = _like(tokens, top_k, dtype=torch.int64), _like(tokens * top_k, dtype=torch.int64)
    weight_NJ, x_ND = _like(tokens, top_k, dtype=torch.float32), _like(tokens, width)
    copies_MD, both_MX, one_MF = (_like(tokens * top_k, columns) for columns in (width, 2 * inner, inner))
    name = f"D = {width}, J = {top_k}"
    found = weighted_swiglu.Gradients(one_MF, both_MX, weight_NJ)
    return {
        f"permute, {name}": movement.permute_call(x_ND, home_NJ, copies_MD),
        f"combine, {name}": movement.combine_call(copies_MD, home_NJ, x_ND),
        f"weighted SwiGLU, F = {inner}, forward": weighted_swiglu.forward_call(both_MX, weight_NJ, order_M, one_MF),
        f"weighted SwiGLU, F = {inner}, backward": weighted_swiglu.backward_call(
            both_MX, weight_NJ, order_M, one_MF, found
        ),
    }


def all_calls() -> dict[str, Call]:
    """Every kernel at every width of heads it takes, and at the shape of the 6.1B model's experts."""
    calls: dict[str, Call] = {}
    for width in KERNEL_WIDTHS:
        calls |= perceptron_calls(width, down=False) | perceptron_calls(width, down=True)
    for width, planes in ((64, 32), (128, 64)):
        calls |= norm_calls(width, planes)
    return calls | expert_calls(2048, 8, 384)


def measure() -> dict[str, Compiled]:
    """Compile all of them. Raises ConfigError without Triton, and where its interpreter is on."""
    if interpreted():
        raise ConfigError("compiles nothing", field="TRITON_INTERPRET", value="1", fix="unset TRITON_INTERPRET")
    return {name: compile_call(call) for name, call in all_calls().items()}


def to_dict(found: Mapping[str, Compiled]) -> dict[str, Any]:
    """Plain JSON."""
    return {
        "capability": CAPABILITY,
        "triton": version("triton"),
        "kernels": {name: asdict(compiled) for name, compiled in found.items()},
    }


def format_measured(found: Mapping[str, Compiled]) -> str:
    """The table of docs/performance.md."""
    lines = [
        f"bf16, compiled for sm_{CAPABILITY}a by triton {version('triton')}; wgmma: tensor-core instructions; "
        + "resident: programs that a multiprocessor holds at once",
        "",
        "| kernel | registers | spilled bytes | shared KiB | wgmma | resident |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        lines.append(
            f"| {name} | {one.registers} | {one.spill_stores + one.spill_loads} | {one.shared_bytes / 1024:g} | "
            f"{one.wgmma} | {one.resident} |"
        )
    return "\n".join(lines)


def _like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
