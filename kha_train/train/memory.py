"""Explains an out-of-memory error: planned against available memory, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch

from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.errors import ConfigError, MachineError
from kha_train.estimate.memory import GIB, plan_memory
from kha_train.estimate.remedies import savings
from kha_train.telemetry.meters import PeakMemory

MOST_OFFERED = 3
_ON_A_CPU = "DefaultCPUAllocator"
_ON_A_DEVICE = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "Cuda failure 'out of memory'")
"""Error messages of libraries that allocate memory outside torch's allocator: cuBLAS, the driver, NCCL."""


@contextmanager
def explained_when_out_of_memory(config: RunConfig, world: World, has_fitted: Callable[[], bool]) -> Iterator[None]:
    """Around a run. If the device has too little memory, raises ConfigError, because the next start would fail as well;
    MachineError once `has_fitted` says that a whole step had enough, or if the host has too little.

    Only the rank that ran out of memory knows about it; the others end because it is gone.
    """
    memory = PeakMemory(world.device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        on_device = _lacks_device_memory(error)
        kind = ConfigError if on_device and not has_fitted() else MachineError
        raise kind(
            f"rank {world.rank} is out of {'' if on_device else 'host '}memory: {_planned(config, world)}; held at "
            f"most {memory.gib():.2f} GiB{_of_total(memory)}; it says: {(str(error) or repr(error)).splitlines()[0]}",
            field="engine.micro_batch_size",
            value=config.engine.micro_batch_size,
            fix=" or ".join(_remedies(config, world)) or "more devices, or a smaller model",
            code="E11",
        ) from error


def lacks_memory(error: BaseException) -> bool:
    """Whether `error` is one of the forms in which Python and torch report a lack of memory."""
    on_host = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _ON_A_CPU in str(error))
    return on_host or _lacks_device_memory(error)


def _lacks_device_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_A_DEVICE)


@contextmanager
def as_memory_error() -> Iterator[None]:
    """Around work that may run out of memory without ending the run: raises MemoryError for all such errors."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise MemoryError(str(error).splitlines()[0]) from error


def _of_total(memory: PeakMemory) -> str:
    total = memory.total_gib()
    return f" of {total:.2f}" if total else ""


def _here(config: RunConfig, world: World) -> RunConfig:
    # What can run here was decided when the run started, so the capability is not checked again.
    device: Literal["cpu", "cuda"] = "cuda" if world.device.type == "cuda" else "cpu"
    return replace(config, cluster=replace(config.cluster, devices=world.size, device=device, capability=0.0))


def _planned(config: RunConfig, world: World) -> str:
    plan = plan_memory(_here(config, world))
    largest = sorted(plan.terms.items(), key=lambda term: -term[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    return f"planned {plan.total / GIB:.2f} GiB when {plan.moment} (most of it {parts})"


def _remedies(config: RunConfig, world: World) -> list[str]:
    """Settings that save memory according to the plan, the largest saving first, with the amount."""
    found = savings(_here(config, world))[:MOST_OFFERED]
    return [f"{setting} (saves {_amount(saved)})" for setting, saved in found]


def _amount(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:.3g} MiB"
