"""Out of memory, told as what was planned against what was there, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.engine.memory import GIB, plan_memory
from kha_train.errors import ConfigError
from kha_train.telemetry.meters import PeakMemory

_ON_A_CPU = "DefaultCPUAllocator"


@contextmanager
def told_when_out_of_memory(config: RunConfig, world: World) -> Iterator[None]:
    """Around a run. Raises ConfigError where torch found no memory: it would find none the next time either.

    Only the rank that ran out knows of it; the others end because it is gone.
    """
    memory = PeakMemory(world.device)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _ON_A_CPU not in str(error):
            raise
        raise ConfigError(
            f"rank {world.rank} is out of memory: {_planned(config, world)}; held at most {memory.gib():.2f} GiB"
            f"{_of_total(memory)}; torch says: {str(error).splitlines()[0]}",
            field="engine.micro_batch_size",
            value=config.engine.micro_batch_size,
            fix=" or ".join(_remedies(config, world)) or "more devices, or a smaller model",
        ) from error


def _of_total(memory: PeakMemory) -> str:
    total = memory.total_gib()
    return f" of {total:.2f}" if total else ""


def _here(config: RunConfig, world: World) -> RunConfig:
    device = "cuda" if world.device.type == "cuda" else "cpu"
    return replace(config, cluster=replace(config.cluster, devices=world.size, device=device))


def _planned(config: RunConfig, world: World) -> str:
    plan = plan_memory(_here(config, world))
    largest = sorted(plan.terms.items(), key=lambda term: -term[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    return f"planned {plan.total / GIB:.2f} GiB when {plan.moment} (most of it {parts})"


def _remedies(config: RunConfig, world: World) -> list[str]:
    """Settings that the plan says save memory, the one that saves most first, with how much."""
    engine, now = config.engine, plan_memory(_here(config, world)).total
    asked = {
        f"engine.micro_batch_size={engine.micro_batch_size // 2}": {"micro_batch_size": engine.micro_batch_size // 2},
        "engine.activation_checkpointing=full": {"activation_checkpointing": "full"},
        "engine.zero_stage=3": {"zero_stage": 3},
    }
    found = []
    for setting, changes in asked.items():
        if changes.get("micro_batch_size", 1) < 1:
            continue
        saved = now - plan_memory(_here(replace(config, engine=replace(engine, **changes)), world)).total
        if saved > 0:
            found.append((saved, f"{setting} (saves {saved / GIB:.2f} GiB)"))
    return [text for _, text in sorted(found, reverse=True)]
