"""Every kernel compiled for Hopper, without a GPU: no spills, tensor cores in use, shared memory that fits.

Each kernel is compiled from the very call that its operator makes, with tensors on the meta device.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kha_train.bench import kernels as bench
from kha_train.bench.kernels import norm_calls, perceptron_calls
from kha_train.cli.main import app
from kha_train.config.resolve import interpreted
from kha_train.model.kernels import launch
from kha_train.model.kernels.compiler import SHARED_BYTES, compile_call, resident_programs
from kha_train.variants.interactions import KERNEL_WIDTHS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it exists for Linux alone"),
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled"),
]


TENSOR_CORES = {
    name: call
    for width in KERNEL_WIDTHS
    for down in (False, True)
    for name, call in perceptron_calls(width, down).items()
}
MEMORY = {
    name: call
    for width, planes in ((32, 16), (64, 16), (64, 32), (128, 64), (256, 128))
    for name, call in norm_calls(width, planes).items()
}
CALLS = TENSOR_CORES | MEMORY


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_keeps_its_registers_uses_tensor_cores_and_fits_the_chip(name: str) -> None:
    call = CALLS[name]
    found = compile_call(call)
    assert (found.spill_stores, found.spill_loads) == (0, 0), found
    assert found.shared_bytes <= SHARED_BYTES, found
    assert found.warnings == (), found
    assert (found.wgmma > 0) == (name in TENSOR_CORES), found
    assert found.resident >= call.launch.resident, found


def test_a_kernel_that_spills_is_found_out() -> None:
    """The same kernel with all rows' accumulators in one warp group."""
    call = CALLS["KHA-MLP with W_down, K = 128, forward"]
    crowded = call._replace(constants=dict(call.constants) | {"ROWS": 128}, launch=call.launch._replace(rows=128))
    assert compile_call(crowded).spill_stores > 0


def test_programs_of_a_multiprocessor_are_bound_by_registers_memory_and_warps() -> None:
    assert resident_programs(registers=128, shared_bytes=80 * 1024, warps=8) == 2
    assert resident_programs(registers=255, shared_bytes=0, warps=4) == 2
    assert resident_programs(registers=32, shared_bytes=0, warps=16) == 4
    assert resident_programs(registers=32, shared_bytes=228 * 1024, warps=4) == 0


def test_the_table_of_kernels_is_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "KHA-MLP, K = 16, forward"
    monkeypatch.setattr(bench, "all_calls", lambda: {name: CALLS[name]})
    found = json.loads(CliRunner().invoke(app, ["bench", "kernels", "--json"]).stdout)["kernels"][name]
    compiled = compile_call(CALLS[name])
    assert (found["registers"], found["shared_bytes"]) == (compiled.registers, compiled.shared_bytes)
    assert f"| {name} | {compiled.registers} | 0 |" in CliRunner().invoke(app, ["bench", "kernels"]).stdout


def test_every_kernel_is_in_the_table() -> None:
    """Each `@jit` kernel that stores something is compiled for at least one shape."""
    kernels = {call.kernel.fn.__module__ + "." + call.kernel.__name__ for call in bench.all_calls().values()}
    folder = Path(launch.__file__).parent
    written = {
        f"kha_train.model.kernels.{path.stem}.{name}"
        for path in folder.glob("*_kernels.py")
        for name in re.findall(r"@jit\ndef ([a-z]\w*)\(", path.read_text())
    }
    assert kernels == written
