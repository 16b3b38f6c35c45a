"""Estimates memory, time, cost and traffic of a run from its configuration alone, without a GPU or torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kha_train.config.constants import RING_COPIES, RING_KEPT
from kha_train.config.resolve import Resolved, planned_device, resolve_plan
from kha_train.config.schema import RunConfig
from kha_train.config.validate_ranks import validate_batch
from kha_train.data.format import manifest
from kha_train.data.sources import begins_with_labels, open_samples, open_validation, validation_sets, without_labels
from kha_train.errors import ConfigError, DataError
from kha_train.estimate.context import Exchanged, exchanged
from kha_train.estimate.counts import (
    FlopCount,
    InteractionOverhead,
    ParameterCount,
    cache_bytes_per_row,
    cache_bytes_per_token,
    count_parameters,
    flops_per_token,
    held_parameters,
    interaction_overhead,
    map_parameters,
)
from kha_train.estimate.figures import DataUse, PlannedBatch, RunTime, SavedSize
from kha_train.estimate.long_step import long_step_warning
from kha_train.estimate.memory import (
    FROZEN_BYTES,
    GIB,
    MemoryPlan,
    largest_micro_batch,
    optimizer_bytes,
    plan_memory,
    recipes,
    uses_bf16,
)
from kha_train.estimate.remedies import Remedy, advise, with_engine
from kha_train.estimate.traffic import Communication, communication

STAGES = (1, 2, 3)
ESTIMATED = "deepspeed"
"""The engine whose memory and traffic the plan estimates."""


@dataclass(frozen=True)
class Plan:
    """The result of `kha plan`. `fits` is None when the memory of a device is unknown. `batch_problem` and
    `data_problem` are the errors that would end a run before its first step.
    """

    config: RunConfig
    parameters: ParameterCount
    flops: FlopCount
    overhead: InteractionOverhead
    memory: MemoryPlan
    budget_bytes: int | None
    fits: bool | None
    largest_micro_batch: int | None
    remedies: tuple[Remedy, ...]
    together: str | None
    communication: tuple[Communication, ...]
    exchanged: Exchanged
    batch_problem: str | None
    data_problem: str | None
    time: RunTime
    checkpoint: SavedSize
    data: DataUse
    resolved: Resolved

    @property
    def accepted(self) -> bool:
        """Whether the run could start there, as far as known."""
        return self.fits is not False and self.batch_problem is None and self.data_problem is None

    @property
    def warning(self) -> str:
        """Warnings about very long steps, an engine that the plan does not estimate, and a peak that is not that of the
        precision; "" without any.
        """
        engine = self.config.engine.name
        rows = self.config.data.batch_sizes.largest * self.exchanged["ranks"] // self.config.cluster.devices
        other = "" if engine == ESTIMATED else f"engine.name = {engine}: memory and traffic are those of {ESTIMATED}"
        wide = planned_device(self.config).kind == "cuda" and not uses_bf16(self.config)
        peak = "in fp32, times hold only if cluster.peak_tflops is that of fp32, not of bf16" if wide else ""
        long = long_step_warning(self.config, rows, self.time["step_seconds"])
        return "; ".join(filter(None, (other, peak, long)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON output. Its keys are documented in docs/plan.md and do not change."""
        config, cluster = self.config, self.config.cluster
        # ZeRO 3 shares no experts.
        shared = config.engine.expert_parallel
        engines = {stage: {"zero_stage": stage, "expert_parallel": 1 if stage == 3 else shared} for stage in STAGES}
        stages = {stage: plan_memory(with_engine(config, **engine)) for stage, engine in engines.items()}
        return {
            "model": config.model.name,
            "attention": config.attention.name,
            "cluster": asdict(cluster),
            "precision": self.resolved.precision,
            "attention_backend": self.resolved.backend._asdict(),
            "params": {
                "total": self.parameters.total,
                "active": self.parameters.active,
                "by_component": self.parameters.by_component,
                "frozen": self.parameters.frozen,
            },
            "flops_per_token": asdict(self.flops),
            "interaction_overhead": {
                "parameters_percent": self.overhead.parameters,
                "flops_percent": self.overhead.flops,
                "cache_percent": self.overhead.cache,
            },
            "cache_bytes_per_token": cache_bytes_per_token(config),
            "cache_bytes_per_row": cache_bytes_per_row(config),
            "memory_per_rank": {
                "total_bytes": self.memory.total,
                "allocated_bytes": self.memory.allocated,
                "moment": self.memory.moment,
                "terms": self.memory.terms,
                "budget_bytes": self.budget_bytes,
                "fits": self.fits,
                "micro_batch_size": config.engine.micro_batch_size,
                "largest_micro_batch": self.largest_micro_batch,
                "by_stage": {str(stage): memory.total for stage, memory in stages.items()},
                "recipes": recipe_table(config, self.parameters.total),
            },
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "together": self.together,
            "communication": [asdict(volume) for volume in self.communication],
            "context_parallel": self.exchanged,
            "batch_problem": self.batch_problem,
            "data_problem": self.data_problem,
            "warning": self.warning,
            "time": self.time,
            "checkpoint": self.checkpoint,
            "data": self.data,
        }


def make_plan(config: RunConfig) -> Plan:
    """The plan of `config` on `config.cluster`. Raises ConfigError when a setting cannot run there, and DataError when
    the dataset's manifest is damaged.
    """
    resolved = resolve_plan(config)
    parameters, flops = count_parameters(config), flops_per_token(config)
    memory, cluster = plan_memory(config), config.cluster
    budget = round((cluster.memory_gib - cluster.reserved_gib) * GIB) if cluster.memory_gib else None
    fits = None if budget is None else memory.total <= budget
    remedies, together = advise(config, budget) if budget is not None and not fits else ((), None)
    time = _time(config, flops)
    return Plan(
        config=config,
        parameters=parameters,
        flops=flops,
        overhead=interaction_overhead(config),
        memory=memory,
        budget_bytes=budget,
        fits=fits,
        largest_micro_batch=None if budget is None else largest_micro_batch(config, budget),
        remedies=remedies,
        together=together,
        communication=tuple(communication(config, stage, time["step_seconds"]) for stage in STAGES),
        exchanged=exchanged(config),
        batch_problem=_batch_problem(config),
        data_problem=_data_problem(config),
        time=time,
        checkpoint=_checkpoint(config, parameters, time["step_seconds"]),
        data=_data(config),
        resolved=resolved,
    )


def recipe_table(config: RunConfig, total: int) -> list[dict[str, Any]]:
    """Model states of one rank by recipe and ZeRO stage, in bytes; `offered` says whether this engine supports it."""
    ranks, held = config.cluster.devices, sum(held_parameters(config))
    return [
        {
            "name": recipe.name,
            "bytes_per_parameter": recipe.bytes_per_parameter,
            "offered": recipe.offered,
            "states": {str(stage): recipe.states(total, stage, ranks, held) for stage in STAGES},
        }
        for recipe in recipes(config.optim, map_parameters(config) / total)
    ]


def _batch_problem(config: RunConfig) -> str | None:
    try:
        validate_batch(config, config.cluster.devices)
    except ConfigError as error:
        return str(error)
    return None


def _time(config: RunConfig, flops: FlopCount) -> RunTime:
    """Computation alone, at the cluster's assumed MFU: tokens/s = devices x peak x MFU / FLOPs per token. Figures of a
    step are those of the largest.
    """
    cluster, sizes = config.cluster, config.data.batch_sizes
    tokens_per_step = sizes.largest * config.model.seq_len
    tokens = sizes.total(1, config.run.steps) * config.model.seq_len
    speed = cluster.devices * cluster.peak_tflops * 1e12 * cluster.mfu / flops.mfu
    hours = tokens / speed / 3600 if speed else None
    priced = hours is not None and cluster.price_per_hour > 0
    return {
        "tokens": tokens,
        "tokens_per_step": tokens_per_step,
        "batch_schedule": _schedule(config),
        "total_flops": tokens * flops.mfu,
        "mfu": cluster.mfu,
        "tokens_per_second": speed or None,
        "step_seconds": tokens_per_step / speed if speed else None,
        "hours": hours,
        "device_hours": hours * cluster.devices if hours is not None else None,
        "cost": hours * cluster.devices * cluster.price_per_hour if hours is not None and priced else None,
    }


def _schedule(config: RunConfig) -> list[PlannedBatch]:
    """The batch sizes of the run in order, each with the tokens trained on before it."""
    sizes, length = config.data.batch_sizes, config.model.seq_len
    return [
        {"start_step": one.first, "rows": one.rows, "tokens_before": sizes.total(1, one.first - 1) * length}
        for one in sizes.stretches()
        if one.first <= config.run.steps
    ]


def checkpoint_bytes(config: RunConfig, count: ParameterCount) -> int:
    """The size of a checkpoint: masters and optimiser states, and matrices that are not trained."""
    return optimizer_bytes(config) + FROZEN_BYTES * count.frozen


def ring_checkpoints(config: RunConfig) -> int:
    """The most checkpoints that the ring leaves on disk."""
    return RING_KEPT if config.checkpoint.ring_steps else 0


def kept_checkpoints(config: RunConfig) -> int:
    """The most checkpoints on disk when the run ends: the last ones, those that are kept for good, and the ring."""
    checkpoint = config.checkpoint
    forever = config.run.steps // checkpoint.keep_every_steps if checkpoint.keep_every_steps else 0
    return checkpoint.keep_last + forever + ring_checkpoints(config)


def host_copies(config: RunConfig) -> int:
    """Copies of a checkpoint's tensors in host memory: of the save in the background, and of the ring."""
    return int(config.checkpoint.background) + (RING_COPIES if config.checkpoint.ring_steps else 0)


def _checkpoint(config: RunConfig, count: ParameterCount, step_seconds: float | None) -> SavedSize:
    """Size, time to write, and the save interval that loses the least time: sqrt(2 x write x time between failures)
    (Young 1974).
    """
    cluster = config.cluster
    size = checkpoint_bytes(config, count)
    write = size / (cluster.storage_bandwidth_gb * 1e9) if cluster.storage_bandwidth_gb else None
    failures = cluster.hours_between_failures * 3600 / cluster.devices
    interval = math.sqrt(2 * write * failures) if write is not None else None
    steps = interval / step_seconds if interval is not None and step_seconds else None
    return {
        "bytes": size,
        "kept_bytes": size * kept_checkpoints(config),
        "host_bytes": size * host_copies(config),
        "write_seconds": write,
        "sensible_every_seconds": interval,
        "sensible_every_steps": max(round(steps), 1) if steps is not None else None,
        "every_steps": config.checkpoint.every_steps,
    }


def _data(config: RunConfig) -> DataUse:
    """Epochs over the training data, if its manifests can be read here."""
    wanted = config.data.batch_sizes.total(1, config.run.steps) * config.model.seq_len
    if not _is_here(*_training_data(config)):
        return {"tokens": None, "epochs": None}
    tokens = sum(manifest.load(Path(path), field="data.train").tokens for path in _training_data(config))
    return {"tokens": tokens, "epochs": wanted / tokens if tokens else None}


def _data_problem(config: RunConfig) -> str | None:
    """Why a run could not start with its data, if all of the data are here."""
    held_out = validation_sets(config)
    if not _is_here(*_training_data(config), *(place.path for place in held_out.values())):
        return None
    try:
        labels = begins_with_labels(config, open_samples(config))
        for name in held_out:
            open_validation(config, name)
        return None if labels else str(without_labels("data", "no token of the first step"))
    except (ConfigError, DataError) as error:
        return str(error)


def _training_data(config: RunConfig) -> list[str]:
    return [source.path for source in config.data.sources] or [config.data.train]


def _is_here(*paths: str) -> bool:
    return all((Path(path) / manifest.MANIFEST_NAME).is_file() for path in paths)
