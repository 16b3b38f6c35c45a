"""The experts' kernels compiled for Hopper: they move and scale data, so registers and access width count."""

# N tokens   D model width   J experts per token   M = N * J copies   F expert width

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from kha_train.config.resolve import interpreted
from kha_train.model.kernels import movement, weighted_swiglu
from kha_train.model.kernels.compiler import SHARED_BYTES, compile_call
from kha_train.model.kernels.launch import Call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it exists for Linux alone"),
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled"),
]
N = 16_384
SHAPES = {"6b": (2048, 8, 384), "2.3b": (1152, 4, 768), "qwen3": (2048, 8, 768), "tiny": (128, 2, 128)}
"""Model width, experts a token, expert width; 1152 is no multiple of a tile's columns."""


def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def permute(width: int, top_k: int, _: int) -> Call:
    return movement.permute_call(like(N, width), like(N, top_k, dtype=torch.int64), like(N * top_k, width))


def combine(width: int, top_k: int, _: int) -> Call:
    return movement.combine_call(like(N * top_k, width), like(N, top_k, dtype=torch.int64), like(N, width))


def activate(_: int, top_k: int, inner: int) -> Call:
    weight_NJ, order_M = like(N, top_k, dtype=torch.float32), like(N * top_k, dtype=torch.int64)
    return weighted_swiglu.forward_call(like(N * top_k, 2 * inner), weight_NJ, order_M, like(N * top_k, inner))


def activate_backward(_: int, top_k: int, inner: int) -> Call:
    weight_NJ, order_M = like(N, top_k, dtype=torch.float32), like(N * top_k, dtype=torch.int64)
    both_MX, one_MF = like(N * top_k, 2 * inner), like(N * top_k, inner)
    found = weighted_swiglu.Gradients(one_MF, both_MX, weight_NJ)
    return weighted_swiglu.backward_call(both_MX, weight_NJ, order_M, one_MF, found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [permute, combine, activate, activate_backward], ids=lambda make: make.__name__)
def test_a_kernel_of_the_experts_keeps_its_registers_and_leaves_room_for_others(
    make: Callable[[int, int, int], Call], shape: str
) -> None:
    call = make(*SHAPES[shape])
    found = compile_call(call)
    assert (found.spill_stores, found.spill_loads, found.warnings) == (0, 0, ()), found
    assert found.shared_bytes <= SHARED_BYTES and found.wgmma == 0, found
    assert found.resident >= call.launch.resident, found
    assert found.wide_loads > 0 and found.wide_stores > 0, found
