"""Compiles a kernel without a GPU and reports registers, spills, shared memory and tensor-core instructions.

A kernel that spills registers, serialises its tensor-core instructions or needs more shared memory than the chip has is
slow or cannot start, and no test of values shows that.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kha_train.model.kernels.launch import Call

CAPABILITY = 90
"""Compute capability compiled for: Hopper (H100, H200)."""
SHARED_BYTES = 227 * 1024
"""Shared memory of a multiprocessor available to programs; each takes 1 KiB more than it requests."""
REGISTERS = 65_536
WARPS = 64
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """The result for one kernel: registers per thread, bytes per thread stored to and loaded from spills, shared memory
    per program, wgmma (tensor-core) instructions, loads and stores of 16 bytes per thread, warnings of the assembler,
    and how many programs fit a multiprocessor.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    wgmma: int
    wide_loads: int
    wide_stores: int
    warnings: tuple[str, ...]
    resident: int


def compile_call(call: Call, capability: int = CAPABILITY) -> Compiled:
    """Compile `call`, whose tensors may be on the meta device, with exactly the options it is launched with."""
    from kha_train.model.kernels.language import triton

    source = triton.compiler.ASTSource(call.kernel, *_specialised(call))
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": call.launch.warps, "num_stages": call.launch.stages}
    built = triton.compile(source, target=target, options=options)
    ptx = built.asm["ptx"]
    told = _assemble(triton, ptx, capability)
    registers = _number(r"Used (\d+) registers", told)
    shared = built.metadata.shared
    return Compiled(
        name=call.kernel.__name__,
        registers=registers,
        spill_stores=_number(r"(\d+) bytes spill stores", told),
        spill_loads=_number(r"(\d+) bytes spill loads", told),
        shared_bytes=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        wide_loads=ptx.count("ld.global.v4.b32"),
        wide_stores=ptx.count("st.global.v4.b32"),
        warnings=tuple(line.strip() for line in told.splitlines() if "warning" in line.lower() or "serializ" in line),
        resident=resident_programs(registers, shared, call.launch.warps),
    )


def resident_programs(registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs fit a multiprocessor at the same time: registers are allocated to warps in units of 256."""
    per_warp = -(-32 * registers // 256) * 256
    return min(REGISTERS // (per_warp * warps), SHARED_BYTES // (shared_bytes + 1024), WARPS // warps)


def _specialised(call: Call) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as the launcher would determine them: a number equal to 1 becomes a constant;
    pointers and numbers divisible by 16 are marked as such.
    """
    names = call.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    given = dict(zip(names, call.arguments, strict=False)) | dict(call.constants)
    for place, name in enumerate(names):
        value = given[name]
        if name in call.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _assemble(triton: Any, ptx: str, capability: int) -> str:
    """The output of Triton's own assembler for `ptx`."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = f"--gpu-name=sm_{capability}" + ("a" if capability == 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(assembler), "-v", target, str(source), "-o", str(Path(folder) / "kernel.cubin")]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout + answer.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])
