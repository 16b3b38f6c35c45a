"""How kernels are launched: one description of a call, which the launcher runs and the compile tests compile."""

# B batch   T tokens   H heads   K head width

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED_PROGRAMS = 3
"""Programs of a persistent grid where there is no device: some walk over several tiles, as on one."""


class Launch(NamedTuple):
    """Options of a kernel: rows of a tile, warps and pipeline stages of a program, and how many programs a streaming
    multiprocessor is to hold at once, which the compiler's registers and shared memory must allow."""

    rows: int
    warps: int
    stages: int
    resident: int


class Call(NamedTuple):
    """One call of a kernel: `arguments` are tensors and numbers in the order of its parameters, `constants` are those
    known when it is compiled."""

    kernel: Any
    programs: int
    arguments: tuple[Tensor | int | float | None, ...]
    constants: Mapping[str, Any]
    launch: Launch

    def start(self) -> None:
        """Run it on the device of its tensors. Triton by itself takes the current one."""
        options = {"num_warps": self.launch.warps, "num_stages": self.launch.stages}
        with torch.cuda.device_of(self.arguments[0]):
            self.kernel[(self.programs,)](*self.arguments, **self.constants, **options)


def as_rows(x_BTHK: Tensor) -> Tensor:
    """The tensor itself where one stride leads from token to token and heads are dense, else a copy: what `load_rows`
    of `language.py` reads with strides 1 and 2."""
    batch, tokens = x_BTHK.shape[:2]
    along = batch == 1 or x_BTHK.stride(0) == tokens * x_BTHK.stride(1)
    # `contiguous` does not look at the strides of dimensions of one.
    return x_BTHK if along and x_BTHK.stride(3) == 1 else x_BTHK.clone(memory_format=torch.contiguous_format)


def persistent_programs(device: torch.device, tiles: int, launch: Launch) -> int:
    """Programs of a grid that fills the device once, each walking over its share of `tiles`."""
    most = launch.resident * _multiprocessors(device) if device.type == "cuda" else INTERPRETED_PROGRAMS
    return max(1, min(tiles, most))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
