"""Checks that a configuration fits a number of ranks."""

from __future__ import annotations

import math
import shlex

from kha_train.config.schema import DataSection, RunConfig
from kha_train.errors import ConfigError, Settings, either


def validate_batch(config: RunConfig, world_size: int) -> None:
    """The global batch must divide evenly among the ranks and their micro-batches, and the ranks into groups that hold
    the weights or share the experts. Raises ConfigError.
    """
    if world_size % config.engine.hpz_partition_size:
        raise ConfigError(
            f"{world_size} ranks do not divide into such groups",
            field="engine.hpz_partition_size",
            value=config.engine.hpz_partition_size,
            fix="the number of ranks on a node",
        )
    parts = config.engine.context_parallel
    for name, size, shared in (
        ("expert_parallel", config.engine.expert_parallel, "the experts"),
        ("context_parallel", parts, "their rows"),
    ):
        if world_size % size:
            raise ConfigError(
                f"{world_size} ranks do not divide into groups that share {shared}",
                field=f"engine.{name}",
                value=size,
                allowed=divisors_of(world_size),
                fix=Settings(f"engine.{name}={math.gcd(world_size, size)}"),
            )
    micro, sharing = config.engine.micro_batch_size, "ranks" if parts == 1 else "ranks / engine.context_parallel"
    unit = micro * world_size // parts
    for number, stretch in enumerate(config.data.batch_sizes.stretches()):
        if stretch.rows % unit:
            key = f"data.batch_schedule[{number - 1}].global_batch_size" if number else "data.global_batch_size"
            raise ConfigError(
                f"does not divide into micro-batches of {micro} on {world_size} ranks",
                field=key,
                value=stretch.rows,
                allowed=f"multiples of engine.micro_batch_size x {sharing} = {unit}",
                fix=either(*_dividing(config.data, unit)),
                code="E07",
            )


def _dividing(data: DataSection, unit: int) -> list[Settings]:
    """The sizes that are no multiples of `unit` rounded down, and up, to one."""
    found = []
    for up in (False, True):
        sizes = [_rounded(change.global_batch_size, unit, up) for change in data.batch_schedule]
        changes = zip(data.batch_schedule, sizes, strict=True)
        text = ", ".join(f"{{start_step: {change.start_step}, global_batch_size: {size}}}" for change, size in changes)
        first = [f"data.global_batch_size={_rounded(data.global_batch_size, unit, up)}"]
        later = [shlex.quote(f"data.batch_schedule=[{text}]")]
        others = any(change.global_batch_size % unit for change in data.batch_schedule)
        found.append(Settings(" ".join(first * bool(data.global_batch_size % unit) + later * others)))
    return list(dict.fromkeys(found))


def _rounded(rows: int, unit: int, up: bool) -> int:
    return max(unit, -(-rows // unit) * unit if up else rows // unit * unit)


def divisors_of(number: int) -> str:
    """The divisors of `number` in words."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
