"""Launching kernels: one description of a call, which the launcher runs and the compile tests compile."""

# B batch   T tokens   H heads   K head width

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED_PROGRAMS = 3
"""Programs of a persistent grid without a device: some of them process several tiles, as on a device."""


class Launch(NamedTuple):
    """Options of a kernel: rows per tile, warps and pipeline stages per program, and the number of programs a streaming
    multiprocessor should hold at a time, which registers and shared memory must allow.
    """

    rows: int
    warps: int
    stages: int
    resident: int


class Call(NamedTuple):
    """One call of a kernel: `arguments` are tensors and numbers in the order of its parameters, `constants` are those
    known at compile time.
    """

    kernel: Any
    programs: int
    arguments: tuple[Tensor | int | float | None, ...]
    constants: Mapping[str, Any]
    launch: Launch

    def start(self) -> None:
        """Run it on the device of its tensors; Triton itself uses the current device."""
        options = {"num_warps": self.launch.warps, "num_stages": self.launch.stages}
        with torch.cuda.device_of(self.arguments[0]):
            self.kernel[(self.programs,)](*self.arguments, **self.constants, **options)


def as_rows(x_BTHK: Tensor) -> Tensor:
    """The tensor itself if it has one stride from token to token and dense heads, otherwise a copy: what `load_rows` of
    `language.py` reads with strides 1 and 2.
    """
    batch, tokens = x_BTHK.shape[:2]
    along = batch == 1 or x_BTHK.stride(0) == tokens * x_BTHK.stride(1)
    # `contiguous` ignores the strides of dimensions of size one.
    return x_BTHK if along and x_BTHK.stride(3) == 1 else x_BTHK.clone(memory_format=torch.contiguous_format)


def persistent_programs(device: torch.device, tiles: int, launch: Launch) -> int:
    """Number of programs that fills the device once, each processing its share of `tiles`."""
    most = launch.resident * _multiprocessors(device) if device.type == "cuda" else INTERPRETED_PROGRAMS
    return max(1, min(tiles, most))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
