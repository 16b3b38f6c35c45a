"""One configuration on growing numbers of devices: what binds at each, the MFU that is left, failures and goodput.

Computation runs at `cluster.mfu`; traffic that is not hidden behind it is added (`Communication`). Devices fail
independently, each once in `cluster.hours_between_failures` on average, so that N of them fail N times as often. A
failure ends the whole run, which goes on from its newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kha_train.config.schema import RunConfig
from kha_train.config.surroundings import ClusterSection
from kha_train.config.validate import validate
from kha_train.errors import ConfigError, Settings
from kha_train.estimate.memory import GIB, micro_batches, plan_memory
from kha_train.estimate.plan import STAGES, Plan, make_plan
from kha_train.estimate.remedies import with_engine

RESTART_SECONDS = 300.0
"""Assumed from a failure to the first new step, besides reading the checkpoint: scheduling, start, compilation."""
Bound = Literal["memory", "batch", "computation", "node links", "network", "failures", "unknown"]


@dataclass(frozen=True)
class Stage:
    """The configuration on so many devices under a ZeRO stage. What cannot be computed is None: figures of time without
    a peak or bandwidth, and where the batch does not divide.

    `binds` is `batch` or `memory` where they forbid it, otherwise what takes the largest part of the wall time.
    `mfu` is that of the steps. `goodput` is the part of the wall time in which steps are made that count, with a
    checkpoint every `checkpoint.every_steps`.
    """

    zero_stage: int
    configured: bool
    binds: Bound
    memory_bytes: int
    fits: bool | None
    step_seconds: float | None
    exposed_seconds: float | None
    mfu: float | None
    tokens_per_second: float | None
    goodput: float | None


@dataclass(frozen=True)
class Size:
    """The configuration on `devices`: micro-batches of a rank and step, and failures of the cluster."""

    devices: int
    micro_batches: int
    batch_problem: str | None
    hours_between_failures: float
    failures_per_day: float
    stages: tuple[Stage, ...]

    @property
    def best(self) -> Stage | None:
        """The stage that makes most tokens a second, of those that may fit."""
        able = [stage for stage in self.stages if stage.tokens_per_second and stage.fits is not False]
        return max(able, key=lambda stage: stage.tokens_per_second or 0.0, default=None)


def scale(config: RunConfig, sizes: Sequence[int]) -> list[Size]:
    """`config` on each number of devices of its cluster's kind. Raises as `make_plan` does, and ConfigError where
    devices fail all the time.
    """
    if not config.cluster.hours_between_failures:
        raise ConfigError(
            "is a device that never works",
            field="cluster.hours_between_failures",
            value=0.0,
            allowed="above 0",
            fix=Settings("cluster.hours_between_failures=50000"),
        )
    return [_size(replace(config, cluster=replace(config.cluster, devices=devices))) for devices in sizes]


def told(config: RunConfig, sizes: Sequence[Size]) -> dict[str, Any]:
    """The JSON output of `kha plan --scale`, whose keys do not change."""
    return {
        "model": config.model.name,
        "attention": config.attention.name,
        "cluster": asdict(config.cluster),
        "restart_seconds": RESTART_SECONDS,
        "sizes": [{**asdict(size), "best": size.best and size.best.zero_stage} for size in sizes],
    }


def goodput(interval: float, between_failures: float, restart: float, paused: float = 0.0) -> float:
    """The part of the wall time that trains, when `interval` seconds of training and `paused` ones for the save stand
    between checkpoints: failures come at random, `between_failures` apart on average, also while a run restarts
    (Daly 2006, the complete model).
    """
    segments = (interval + paused) / between_failures
    if segments + restart / between_failures > math.log(1e12):
        return 0.0
    return interval / (between_failures * math.exp(restart / between_failures) * math.expm1(segments))


def _size(config: RunConfig) -> Size:
    cluster = config.cluster
    # Without a budget of memory, remedies are not looked for.
    plan = make_plan(replace(config, cluster=replace(cluster, memory_gib=0.0)))
    hours = cluster.hours_between_failures / cluster.devices
    stages = tuple(_stage(plan, config, stage) for stage in STAGES if _admits(config, stage))
    return Size(cluster.devices, micro_batches(config), plan.batch_problem, hours, 24 / hours, stages)


def _admits(config: RunConfig, stage: int) -> bool:
    """Whether the other settings admit a ZeRO stage; its own always."""
    if stage == config.engine.zero_stage:
        return True
    try:
        validate(with_engine(config, zero_stage=stage))
    except ConfigError:
        return False
    return True


def _stage(plan: Plan, config: RunConfig, stage: int) -> Stage:
    memory, cluster = plan_memory(with_engine(config, zero_stage=stage)).total, config.cluster
    fits = memory <= (cluster.memory_gib - cluster.reserved_gib) * GIB if cluster.memory_gib else None
    computed = None if plan.batch_problem else plan.time["step_seconds"]
    exposed = _exposed(plan, stage)
    step = computed + exposed if computed is not None and exposed is not None else None
    share = _goodput(config, step, plan.checkpoint["write_seconds"])
    return Stage(
        zero_stage=stage,
        configured=stage == config.engine.zero_stage,
        binds="batch"
        if plan.batch_problem
        else "memory"
        if fits is False
        else _longest(cluster, computed, step, share),
        memory_bytes=memory,
        fits=fits,
        step_seconds=step,
        exposed_seconds=None if step is None else exposed,
        mfu=cluster.mfu * computed / step if computed is not None and step else None,
        tokens_per_second=plan.time["tokens_per_step"] / step if step else None,
        goodput=share,
    )


def _exposed(plan: Plan, stage: int) -> float | None:
    """Seconds of a step in which a rank waits for gradients, weights and tokens, and heads where they share rows."""
    waits = [plan.communication[stage - 1].exposed_seconds_per_step]
    if plan.exchanged["ranks"] > 1:
        waits.append(plan.exchanged["seconds_per_step"])
    known = [seconds for seconds in waits if seconds is not None]
    return sum(known) if len(known) == len(waits) else None


def _longest(cluster: ClusterSection, computed: float | None, step: float | None, share: float | None) -> Bound:
    """What takes the largest part of the wall time in which a step is made."""
    if computed is None or step is None:
        return "unknown"
    link: Bound = "node links" if cluster.devices <= cluster.devices_per_node else "network"
    parts: dict[Bound, float] = {"computation": computed, link: step - computed}
    if share is not None:
        parts["failures"] = step / share - step if share else math.inf
    return max(parts, key=parts.__getitem__)


def _goodput(config: RunConfig, step: float | None, write: float | None) -> float | None:
    """With a checkpoint every `checkpoint.every_steps`, where a step takes `step` seconds and a checkpoint `write`."""
    if step is None or write is None:
        return None
    interval = config.checkpoint.every_steps * step
    # Written in the background, a checkpoint stops a step only when the one before is not written yet, and a failure
    # meanwhile loses what it would have kept.
    paused, lost = (max(write - interval, 0.0), write) if config.checkpoint.background else (write, 0.0)
    between = config.cluster.hours_between_failures * 3600 / config.cluster.devices
    return goodput(interval, between, RESTART_SECONDS + write + lost, paused)
