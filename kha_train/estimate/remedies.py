"""What saves memory: the settings that a plan, or an out-of-memory error, can offer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kha_train.config.constants import ROUNDING
from kha_train.config.schema import RunConfig
from kha_train.estimate.memory import plan_memory, uses_bf16

SHARED = "expert_parallel"
"""The field of `engine` with the number of ranks that share the experts."""


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory: the overrides, the memory a rank needs then, and what the change costs."""

    overrides: str
    saves_bytes: int
    total_bytes: int
    fits: bool
    price: str


class Change(NamedTuple):
    """A possible remedy: its override, the engine field it sets, and its price."""

    override: str
    fields: dict[str, Any]
    price: str


def advise(config: RunConfig, budget: int) -> tuple[tuple[Remedy, ...], str | None]:
    """Each remedy that saves memory alone, cheapest first, and a sufficient set: as few as possible together, on as few
    devices as possible. A remedy may help only together with others, or on more devices. Of the numbers of ranks that
    may share the experts, the lowest that fits is offered, or the one that saves most.
    """
    now, candidates = plan_memory(config).total, possible_changes(config)
    alone = [
        (change, plan_memory(changed).total)
        for change in candidates
        if _is_possible(changed := with_engine(config, **change.fields))
    ]
    shared = [(total, change.override) for change, total in alone if SHARED in change.fields]
    lowest = next((override for total, override in shared if total <= budget), min(shared, default=(0, ""))[1])
    remedies = tuple(
        Remedy(change.override, now - total, total, total <= budget, change.price)
        for change, total in alone
        if total < now and (SHARED not in change.fields or change.override == lowest)
    )
    chosen = _enough(config, candidates, budget)
    if chosen is not None:
        return remedies, " ".join(change.override for change in chosen)
    devices = _devices_needed(config, candidates, budget)
    if devices is None:
        return remedies, None
    chosen = _enough(_with_devices(config, devices), candidates, budget)
    assert chosen is not None
    return remedies, " ".join([*(change.override for change in chosen), f"cluster.devices={devices}"])


def _enough(config: RunConfig, candidates: list[Change], budget: int) -> tuple[Change, ...] | None:
    """The smallest set of `candidates` with which `config` fits, the cheapest of equal size; None when there is
    none.
    """
    for count in range(len(candidates) + 1):
        for chosen in itertools.combinations(candidates, count):
            fields = {field: value for change in chosen for field, value in change.fields.items()}
            if len(fields) < count:
                continue
            changed = with_engine(config, **fields)
            if _is_possible(changed) and plan_memory(changed).total <= budget:
                return chosen
    return None


def _is_possible(config: RunConfig) -> bool:
    """Whether the ranks that share the experts divide the ranks, and ZeRO is not 3 where they are several."""
    shared = config.engine.expert_parallel
    return config.cluster.devices % shared == 0 and (shared == 1 or config.engine.zero_stage < 3)


def savings(config: RunConfig) -> list[tuple[str, int]]:
    """The overrides that save memory alone and change no result beyond rounding, each with the bytes it saves, the
    largest saving first. Of the numbers of ranks that may share the experts, the highest inside a node, or the lowest.
    """
    now = plan_memory(config).total
    changes = possible_changes(config, max(1, config.engine.micro_batch_size // 2))
    free = [change for change in changes if all(f"engine.{field}" in ROUNDING for field in change.fields)]
    saved = [
        (change.override, now - plan_memory(changed).total, change.fields.get(SHARED, 0))
        for change in free
        if _is_possible(changed := with_engine(config, **change.fields))
    ]
    numbers = [int(shared) for _, size, shared in saved if shared and size > 0]
    inside = [number for number in numbers if number <= config.cluster.devices_per_node]
    offered = (0, max(inside) if inside else min(numbers, default=0))
    found = [(override, size) for override, size, shared in saved if size > 0 and shared in offered]
    return sorted(found, key=lambda one: -one[1])


def possible_changes(config: RunConfig, micro_batch_size: int = 1) -> list[Change]:
    """The possible changes, cheapest first; two changes of one field exclude each other. Each gives a valid
    configuration, and so do several together, but for ZeRO 3 and experts that ranks share, whose number must also
    divide the ranks. `micro_batch_size` is the smaller one that is offered.
    """
    engine, moe, found = config.engine, config.moe, []

    def offer(field: str, value: int | str, price: str) -> None:
        found.append(Change(f"engine.{field}={value}", {field: value}, price))

    if engine.zero_stage == 1:
        offer("zero_stage", 2, "gradients are reduced in every micro-batch")
    if engine.activation_checkpointing == "none" and engine.compile == "none":
        offer("activation_checkpointing", "selective", "norms, gates and routing are computed twice")
    for shared in range(engine.expert_parallel + 1, moe.experts + 1) if engine.compile == "none" else ():
        if moe.experts % shared == 0 and shared % engine.expert_parallel == 0:
            offer(SHARED, shared, "tokens travel to their experts and back in every layer")
    if engine.activation_checkpointing != "full":
        offer("activation_checkpointing", "full", "a third more computation")
    if engine.micro_batch_size > micro_batch_size:
        offer("micro_batch_size", micro_batch_size, "smaller products: slower")
    if engine.zero_stage < 3 and engine.compile == "none":
        offer("zero_stage", 3, "parameters are gathered in every micro-batch")
    if uses_bf16(config) and engine.grad_accum_dtype == "fp32":
        offer("grad_accum_dtype", "bf16", "gradients are summed in bf16")
    if engine.moment_dtype == "fp32" and config.optim.refuses_bf16() is None:
        offer("moment_dtype", "bf16", "both moments are rounded to bf16 after every step")
    return found


def _devices_needed(config: RunConfig, candidates: list[Change], budget: int) -> int | None:
    """A number of devices, up to 65,536, on which some of `candidates` are enough, while they are not on the next
    smaller number. Whole nodes are used where one is not enough, and whole groups that share rows. None when there is
    no such number.
    """
    devices, node = config.cluster.devices, config.cluster.devices_per_node
    counts: list[int] = [*range(devices, node), *range(max(devices, node), 65_537, node)]
    counts = [count for count in counts if count == devices or count % config.engine.context_parallel == 0]

    def fits(place: int) -> bool:
        return _enough(_with_devices(config, counts[place]), candidates, budget) is not None

    low, high = 0, 1
    while high < len(counts) and not fits(high):
        low, high = high, 2 * high
    if high >= len(counts):
        high = len(counts) - 1
        if high <= low or not fits(high):
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return counts[high]


def _with_devices(config: RunConfig, devices: int) -> RunConfig:
    return replace(config, cluster=replace(config.cluster, devices=devices))


def with_engine(config: RunConfig, **changes: Any) -> RunConfig:
    """`config` with some fields of `engine` changed."""
    return replace(config, engine=replace(config.engine, **changes))
