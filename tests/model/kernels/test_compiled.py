"""What the compiler makes of every kernel for Hopper, without a GPU: no spills, tensor cores, shared memory that fits.

Each kernel is compiled from the very call that its operator makes, with tensors on the meta device.
"""

# B batch   T tokens   H heads   K head width

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from kha_train.config.interaction_options import KERNEL_WIDTHS
from kha_train.model.kernels import knocking_mlp, norm_rotate
from kha_train.model.kernels.availability import interpreted
from kha_train.model.kernels.compiler import SHARED_BYTES, compile_call, resident_programs
from kha_train.model.kernels.launch import Call

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it exists for Linux alone"),
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled"),
]


def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def perceptron_calls(width: int, down: bool) -> tuple[Call, Call]:
    """Forward and backward of the shared perceptron on 4 heads."""
    x_BTHK, matrix_KK, both = like(2, 8192, 4, width), like(width, width), like(2, 8192, 4, 2 * width)
    optional = x_BTHK if down else None
    return (
        knocking_mlp.forward_call(x_BTHK, matrix_KK, matrix_KK, matrix_KK if down else None, x_BTHK),
        knocking_mlp.backward_call(x_BTHK, matrix_KK, matrix_KK, x_BTHK, both, optional),
    )


def norm_calls(width: int, planes: int) -> tuple[Call, Call]:
    """Forward and backward of norm and rotation on 32 heads."""
    x_BTHK, weight_K, table_BTR = like(2, 8192, 32, width), like(width), like(2, 8192, planes, dtype=torch.float32)
    return (
        norm_rotate.forward_call(x_BTHK, weight_K, table_BTR, table_BTR, x_BTHK, 1e-6),
        norm_rotate.backward_call(x_BTHK, weight_K, table_BTR, table_BTR, x_BTHK, x_BTHK, 1e-6)[0],
    )


TENSOR_CORE_CALLS: dict[str, Callable[[], Call]] = {
    f"perceptron-{direction}-{width}{'-down' if down else ''}": (
        lambda width=width, down=down, place=place: perceptron_calls(width, down)[place]
    )
    for width in KERNEL_WIDTHS
    for down in (False, True)
    for place, direction in enumerate(("forward", "backward"))
}


MEMORY_CALLS: dict[str, Callable[[], Call]] = {
    f"norm-{direction}-{width}-{planes}": (
        lambda width=width, planes=planes, place=place: norm_calls(width, planes)[place]
    )
    for width, planes in ((32, 16), (64, 16), (64, 32), (128, 64), (256, 128))
    for place, direction in enumerate(("forward", "backward"))
}
CALLS = TENSOR_CORE_CALLS | MEMORY_CALLS


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_keeps_its_registers_uses_tensor_cores_and_fits_the_chip(name: str) -> None:
    call = CALLS[name]()
    found = compile_call(call)
    assert (found.spill_stores, found.spill_loads) == (0, 0), found
    assert found.shared_bytes <= SHARED_BYTES, found
    assert found.warnings == (), found
    assert (found.wgmma > 0) == (name in TENSOR_CORE_CALLS), found
    assert found.resident >= call.launch.resident, found


def test_a_kernel_that_spills_is_found_out() -> None:
    """The same kernel with all rows' accumulators in one warp group."""
    call = perceptron_calls(128, True)[0]
    crowded = call._replace(constants=dict(call.constants) | {"ROWS": 128}, launch=call.launch._replace(rows=128))
    assert compile_call(crowded).spill_stores > 0


def test_programs_of_a_multiprocessor_are_bound_by_registers_memory_and_warps() -> None:
    assert resident_programs(registers=128, shared_bytes=80 * 1024, warps=8) == 2
    assert resident_programs(registers=255, shared_bytes=0, warps=4) == 2
    assert resident_programs(registers=32, shared_bytes=0, warps=16) == 4
    assert resident_programs(registers=32, shared_bytes=228 * 1024, warps=4) == 0
