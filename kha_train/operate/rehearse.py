"""Rehearses a job of many ranks in one process: errors that would appear after hours in a queue appear now.

Batch arithmetic and data slices are those of the real job, for every rank. torch's fake process group lets one process
build rank 0 of any world: its collectives return at once and exchange nothing. If the model fits this machine, the real
engine builds rank 0, takes a step and lists the pieces of its checkpoint. The numbers of that step mean nothing, but
its shapes, settings and memory are real. A larger model is only laid out on `meta`.
"""

# B rows of a rank

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kha_train.checkpoint.layout import FOLDER, candidates
from kha_train.checkpoint.reader import Checkpoint, check_sizes, directory_of
from kha_train.config.compose import shipped
from kha_train.config.resolve import resolve_plan
from kha_train.config.schema import RunConfig
from kha_train.config.validate_ranks import validate_batch
from kha_train.data.sampling.skipping import merged, numbers_past
from kha_train.data.sources import without_labels
from kha_train.data.stream import open_stream
from kha_train.distributed import TORCHRUN, World
from kha_train.engine.default import engine_for
from kha_train.errors import ConfigError, DataError
from kha_train.estimate.counts import count_parameters
from kha_train.estimate.long_step import long_step_warning
from kha_train.estimate.memory import GIB, optimizer_bytes, plan_memory
from kha_train.estimate.plan import checkpoint_bytes, host_copies, ring_checkpoints
from kha_train.evaluate.opening import content_ids, open_tasks
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.device import DTYPES, resolve_on
from kha_train.train import resume
from kha_train.train.branch import Branch
from kha_train.train.progress import Progress, going_on
from kha_train.train.step import train_step

REHEARSED_MICRO_BATCHES = 8
"""Maximum number of micro-batches in the rehearsed step."""


@dataclass(frozen=True)
class Layout:
    """How `world_size` ranks lie on nodes."""

    world_size: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes, all of them full."""
        return self.world_size // self.ranks_per_node


def rehearse(config: RunConfig, overrides: Sequence[str], layout: Layout) -> dict[str, Any]:
    """What the job would do, as nested plain values: batch, data, model, memory, checkpoint, launch.

    Raises ConfigError for settings that the job could not run with (missing data, a batch that does not divide, nodes
    that are not full, a backend that cannot run on the devices of `cluster`), and DataError when the data is damaged,
    has nothing to predict or its slices do not tile the batch; as `Branch` for a branch whose parent it does not fit.
    """
    if layout.world_size % layout.ranks_per_node:
        raise ConfigError(
            f"does not fill nodes of {layout.ranks_per_node} ranks",
            field="world_size",
            value=layout.world_size,
            fix=f"a multiple of {layout.ranks_per_node}, or another --ranks-per-node",
        )
    validate_batch(config, layout.world_size)
    engine_for(config, layout.world_size)
    resolve_plan(config)
    branch = _branch(config)
    begun = going_on(branch.state, config) if branch else Progress()
    parameters, data = count_parameters(config), _data(config, layout.world_size, begun)
    return {
        "world_size": layout.world_size,
        "batch": _batch(config, layout.world_size),
        "data": data,
        **({"branch": {**branch.facts(), "step": begun.step}} if branch else {}),
        "model": {"parameters": parameters.total, "active": parameters.active, "tensors": _count_tensors(config)},
        "memory": _memory(config, layout),
        "checkpoint": _checkpoint(config, layout.world_size),
        "rank_0": _rank_zero(config, layout.world_size, data["labels_first_step"]),
        "launch": _launch(overrides, layout),
    }


def _batch(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Figures of the largest step, and the tokens of all."""
    sizes, micro, length = config.data.batch_sizes, config.engine.micro_batch_size, config.model.seq_len
    rows = sizes.largest
    each = rows * config.engine.context_parallel // world_size
    warning = long_step_warning(config, each)
    return {
        "rows_a_step": rows,
        "rows_a_rank": each,
        "micro_batches_a_step": each // micro,
        "tokens_a_step": rows * length,
        "tokens": sizes.total(1, config.run.steps) * length,
        **({"warning": warning} if warning else {}),
    }


def _data(config: RunConfig, world_size: int, begun: Progress) -> dict[str, Any]:
    """Read the first step of every rank after `begun`. Raises DataError when two ranks or none read a row, or no token
    has a label.
    """
    open_tasks(config)  # opening them checks their data, for all ranks
    firsts = []
    # Of ranks that share rows, the first.
    for rank in range(0, world_size, config.engine.context_parallel):
        stream = open_stream(
            config,
            rank,
            world_size,
            samples_seen=begun.samples_seen,
            steps_done=begun.step,
            skip_windows=begun.skip_windows,
        )
        firsts.append(next(stream).whole)
    samples = np.sort(np.concatenate([batch.samples_B for batch in firsts]))
    windows = merged((*config.data.skip_windows, *begun.skip_windows))
    first_step = numbers_past(windows, begun.samples_seen, config.data.batch_sizes.of(begun.step + 1))
    if not np.array_equal(samples, first_step):
        raise DataError("the slices of the ranks do not tile the first step", field="data", value=samples.tolist())
    labels = sum(batch.label_count for batch in firsts)
    if not labels:
        raise without_labels("data", "no token of the first step")
    return {
        "content_id": stream.content_id,
        "epochs": config.data.batch_sizes.total(1, config.run.steps) / stream.samples_per_epoch,
        "labels_first_step": labels,
        "slices_first_step": [[int(batch.samples_B[0]), int(batch.samples_B[-1])] for batch in firsts],
    }


def _branch(config: RunConfig) -> Branch | None:
    """The branch as which the run would begin; None for any other, and once it has a checkpoint of its own. The files
    of the parent's checkpoint are not read, only their sizes."""
    if not config.run.branch_from or candidates(Path(config.run.dir) / FOLDER):
        return None
    directory = directory_of(Path(config.run.branch_from))
    ids = {"data_content_id": open_stream(config, 0, 1).content_id, **content_ids(open_tasks(config))}
    return Branch(config, Checkpoint(directory, check_sizes(directory)), ids)


def _count_tensors(config: RunConfig) -> int:
    """Lay the decoder out on `meta` and check its parameter count against the accounting."""
    decoder = lay_out_decoder(config)
    held = sum(parameter.numel() for parameter in decoder.parameters())
    assert held == count_parameters(config).total, (
        f"the module has {held:,} parameters, but the accounting has another number"
    )
    return sum(1 for _ in decoder.parameters())


def _memory(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """GiB of one rank by term, as in `kha plan`, for this number of ranks."""
    cluster = replace(config.cluster, devices=layout.world_size, devices_per_node=layout.ranks_per_node)
    plan = plan_memory(replace(config, cluster=cluster))
    terms = {name: size / GIB for name, size in plan.terms.items()}
    return {"moment": plan.moment, **terms, "total": plan.total / GIB}


def _checkpoint(config: RunConfig, world_size: int) -> dict[str, Any]:
    size = checkpoint_bytes(config, count_parameters(config))
    saves = math.ceil(config.run.steps / config.checkpoint.every_steps)
    return {
        "gib": size / GIB,
        "gib_a_rank": size / world_size / GIB,
        "gib_in_host_memory_of_a_rank": size * host_copies(config) / world_size / GIB,
        "gib_kept": size * (min(saves, config.checkpoint.keep_last) + ring_checkpoints(config)) / GIB,
        "saves": saves,
        "files": {
            "model": [f"model-{rank:05d}.safetensors" for rank in (0, world_size - 1)],
            "optimizer": [f"optimizer-{rank:05d}.safetensors" for rank in (0, world_size - 1)],
        },
    }


def _rank_zero(config: RunConfig, world_size: int, labels: int) -> dict[str, Any]:
    need = _bytes_to_build(config, world_size)
    have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have / 2:
        return {"built": False, "why": f"needs about {need / GIB:.0f} GiB, {have / GIB:.0f} GiB are free here"}
    try:
        resolved = resolve_on(config, torch.device("cpu"))
    except ConfigError as error:
        return {"built": False, "why": f"runs on the job's devices but not on this CPU: {error}"}
    # More micro-batches would show nothing new; the time of the whole step follows from these.
    rows = config.data.batch_sizes.largest
    some = min(rows, REHEARSED_MICRO_BATCHES * config.engine.micro_batch_size * world_size)
    config = replace(config, data=replace(config.data, global_batch_size=some, batch_schedule=()))
    engine_class = engine_for(config, world_size)
    with _fake_world(world_size) as world:
        engine = engine_class(config, world, resolved=resolved)
        batch = next(open_stream(config, 0, world_size))
        batch.step_tokens = batch.token_count * world_size
        started = time.perf_counter()
        train_step(engine, batch, labels, config.optim.lr)
        seconds = (time.perf_counter() - started) * rows / config.data.global_batch_size
        pieces = list(resume.pieces(engine))
        buffers = sum(buffer.nbytes for buffer in engine.buffers().values())
        engine.close()
        engine_class.leave_world()
    return {
        "built": True,
        "dtype": str(DTYPES[resolved.precision]).removeprefix("torch."),
        "step_seconds_here": seconds,
        "pieces": len(pieces),
        "checkpoint_bytes": sum(piece.values.nbytes for piece in pieces) + buffers,
    }


def _bytes_to_build(config: RunConfig, world_size: int) -> float:
    total = count_parameters(config).total
    return total * 8 + optimizer_bytes(config) / world_size


@contextmanager
def _fake_world(world_size: int) -> Iterator[World]:
    """Rank 0 of a world whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = {name: os.environ.get(name) for name in TORCHRUN}
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield World(0, world_size, 0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _launch(overrides: Sequence[str], layout: Layout) -> dict[str, Any]:
    script: Path = shipped("launch") / "train.sbatch"
    command = ["sbatch", f"--nodes={layout.nodes}", f"--gpus-per-node={layout.ranks_per_node}", str(script), *overrides]
    return {
        "nodes": layout.nodes,
        "ranks_per_node": layout.ranks_per_node,
        "command": f"KHA_LAUNCH={shlex.quote(str(shipped('launch')))} {shlex.join(command)}",
        "script": script.read_text(encoding="utf-8"),
    }
