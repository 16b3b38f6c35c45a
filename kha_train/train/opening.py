"""Opens everything of an attempt, in order, and returns complete objects.

1. The run directory, so that nobody else writes there. Of a run that is over, nothing else is touched.
2. The checkpoint to resume from, and the data. A run that does not fit them is refused, and keeps what it has.
3. The kernels, the same on all ranks.
4. The engine, restored from the checkpoint, or filled with the weights or the whole state of another run.
5. The record, the console, the sinks and the saver; with them the attempt begins.

What was opened is closed in reverse order, whether opening fails, training fails or training ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from kha_train.checkpoint.reader import Checkpoint, open_verified
from kha_train.config.build import to_plain
from kha_train.config.constants import PRECISION_OF
from kha_train.config.resolve import Choice, Resolved
from kha_train.config.schema import RunConfig
from kha_train.data.stream import TokenStream, open_stream
from kha_train.distributed import World
from kha_train.engine.building import resolve_dtype
from kha_train.engine.contract import Engine, InitialValue
from kha_train.errors import CheckpointError, KhaError
from kha_train.estimate.counts import count_parameters, flops_per_token
from kha_train.evaluate.contract import Task
from kha_train.evaluate.opening import content_ids, measured_facts, open_tasks
from kha_train.model.attention.choice import announce
from kha_train.model.attention.measured import measure, settled
from kha_train.model.device import resolve_on
from kha_train.model.kernel_choice import (
    PARTS,
    Kernels,
    agreed_kernels,
    as_text,
    from_text,
    kernels_of,
    measure_kernels,
    with_kernels,
)
from kha_train.model.moe.experts import announce_experts
from kha_train.record import Record, Redactor
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.files import write_text, written_as
from kha_train.record.schema import Parent
from kha_train.telemetry.console import Console
from kha_train.telemetry.meters import PeakMemory
from kha_train.telemetry.profiler import Profiler
from kha_train.telemetry.sinks import Beginning, Sinks, open_sinks
from kha_train.telemetry.startup import Startup
from kha_train.telemetry.throughput import Throughput
from kha_train.train import resume
from kha_train.train.branch import Branch
from kha_train.train.closing import close_record, sum_up
from kha_train.train.failure import accept
from kha_train.train.metrics import declared
from kha_train.train.preempt import time_warning
from kha_train.train.previous import NOT_FINISHED, find_own_checkpoint, finished_at, needs_no_checkpoint
from kha_train.train.progress import Progress, restore_watch
from kha_train.train.rate_change import tell_rate_change
from kha_train.train.reporter import Journal, Reporter, headline
from kha_train.train.ring import Ring
from kha_train.train.saving import Saver
from kha_train.train.session import Attempt, Session
from kha_train.train.watch import Watch


class Opened(NamedTuple):
    """The open parts of an attempt."""

    session: Session
    reporter: Reporter
    saver: Saver
    ring: Ring


@dataclass(frozen=True)
class Finished:
    """The run already finished at `step`, and `run.steps` is not larger: there is nothing left to train."""

    step: int


@contextmanager
def open_attempt(
    config: RunConfig, world: World, startup: Startup, engine_class: type[Engine], attempt: Attempt
) -> Iterator[Opened | Finished]:
    """Open an attempt of `config`, and close it at the end of the block. Collective. Raises what `train` documents.

    `startup` measures the phases, `attempt` records the progress.
    """
    with ExitStack() as closings:
        yield _open(closings, config, world, startup, engine_class, attempt)


class _Data(NamedTuple):
    """What is trained on, what measures the model, and the ids that name the data of both."""

    stream: TokenStream
    tasks: tuple[Task[Any], ...]
    content_ids: dict[str, str]


class _Kernels(NamedTuple):
    """What computes attention and experts, the attention backend of the last attempt ("" where unknown), and what is
    said of the choice."""

    resolved: Resolved
    earlier_backend: str
    announced: list[str]


def _open(
    closings: ExitStack,
    config: RunConfig,
    world: World,
    startup: Startup,
    engine_class: type[Engine],
    attempt: Attempt,
) -> Opened | Finished:
    journal, finished, is_over = _take_directory(closings, config, world, attempt)
    if is_over:
        return Finished(finished)
    checkpoint = find_own_checkpoint(Path(config.run.dir), world, _refused_checkpoint(config, world, journal))
    startup.mark("run directory, newest checkpoint")
    data, dtype = _open_data(config, world)
    rate_change = _check_fit(config, world, data, dtype, checkpoint, finished)
    if checkpoint is not None and checkpoint.step >= config.run.steps <= finished:
        return Finished(finished)
    # Until the engine is filled, the other run keeps the checkpoint that is read.
    reading = closings.enter_context(ExitStack())
    initial = _initial_values(config, world, data, checkpoint, reading)
    branch = initial if isinstance(initial, Branch) else None
    if branch:
        rate_change = tell_rate_change(branch.rate, world.is_main)
    kernels = _choose_kernels(config, world, _continued(config, checkpoint, branch))
    startup.mark("data")
    accept(Path(config.run.dir), world)
    attempt.is_accepted = True
    engine = _open_engine(closings, config, world, engine_class, initial, kernels.resolved)
    progress = Progress(skip_windows=tuple(sorted(config.data.skip_windows)))
    session = Session(config, world, attempt, engine, *data, Watch(config), progress)
    _fill(session, initial, checkpoint)
    reading.close()
    startup.mark("engine")
    with world.agreed("begin the record"):
        parent = branch.parent if branch else journal.record.parent if checkpoint else None
        reporter = _open_reporter(closings, session, journal, startup, parent)
        saver = _open_saver(closings, session, reporter)
        changes = _changes(session, kernels, initial, rate_change)
        _begin_attempt(session, reporter, kernels, changes, branch)
    startup.mark("record, console and W&B")
    return Opened(session, reporter, saver, Ring(session, reporter.happened))


def _take_directory(
    closings: ExitStack, config: RunConfig, world: World, attempt: Attempt
) -> tuple[Journal, int, bool]:
    """Take the run directory. Returns its record, the step at which the run finished before (or NOT_FINISHED), and
    whether that alone ends the attempt. In that case, or if its checkpoints are lost, nothing else is touched.
    """
    run_dir, finished, is_over = Path(config.run.dir), NOT_FINISHED, False
    with world.agreed(f"write {run_dir}"):
        with written_as("run.dir", run_dir, "choose a writable directory: run.dir=PATH"):
            record = Record.open(run_dir, world.rank)
        closings.callback(record.close)
        if world.is_main:
            finished = finished_at(config, run_dir)
            is_over = needs_no_checkpoint(config, run_dir, finished)
    finished, over = world.max_ints(finished, int(is_over))
    if not over:
        closings.push(lambda kind, error, trace: close_record(config, world, attempt, record, error))
    return Journal(record), finished, bool(over)


def _refused_checkpoint(config: RunConfig, world: World, journal: Journal) -> Callable[[str], None]:
    """What to do about a damaged checkpoint: skip it with a warning. With `resume.strict`, raises CheckpointError on
    all ranks.
    """

    def report(text: str) -> None:
        if world.is_main:
            print(f"warning: {text}", flush=True)
            journal.event("checkpoint_refused", 0, text=text)
        if config.resume.strict:
            raise CheckpointError(text, field="resume.strict", value=True, fix="inspect it, then start again")

    return report


def _open_data(config: RunConfig, world: World) -> tuple[_Data, torch.dtype]:
    """The data, the same on every rank, and the training dtype."""
    with world.agreed():
        stream = open_stream(config, world.rank, world.size)
        tasks = open_tasks(config)
        dtype = resolve_dtype(config, world.device)
    return _Data(stream, tasks, {"data_content_id": stream.content_id, **content_ids(tasks)}), dtype


def _check_fit(
    config: RunConfig, world: World, data: _Data, dtype: torch.dtype, checkpoint: Checkpoint | None, finished: int
) -> dict[str, float]:
    """Refuse data that differs between ranks, and a `checkpoint` of another run. Returns how the learning rate changes,
    as the fields of an event; empty if it does not.
    """
    first = world.broadcast_text(json.dumps(data.content_ids))
    with world.agreed():
        resume.check_same_data(json.loads(first), data.content_ids)
        if checkpoint is None:
            return {}
        precisions = resume.precision(Path(config.run.dir)), PRECISION_OF[str(dtype).removeprefix("torch.")]
        free = ("run.steps",) if finished >= config.run.steps else ()
        change = resume.check_belongs(config, checkpoint, data.content_ids, precisions, *free)
        return tell_rate_change(change, world.is_main)


def _continued(config: RunConfig, checkpoint: Checkpoint | None, branch: Branch | None) -> Path | None:
    """The directory of the run that this attempt goes on from: its own or its parent's; None for a run from scratch."""
    return Path(config.run.dir) if checkpoint else branch.run_dir if branch else None


def _choose_kernels(config: RunConfig, world: World, continued: Path | None) -> _Kernels:
    """Decide on rank 0 what computes attention and experts; every rank takes its answer. `continued` is the
    directory of the run that is gone on with."""
    with world.agreed():
        earlier = resume.attention_backend(continued) if continued else ""
        answer = measure(config, world.device, earlier)
    chosen, measured = settled(config, world.broadcast_text(answer))
    with world.agreed():
        resolved = resolve_on(chosen, world.device)
        if measured:
            resolved = resolved._replace(backend=Choice(resolved.backend.name, "measured, see below"))
        kernels = measure_kernels(chosen, resolved, world.device, _earlier_kernels(continued))
    kernels = agreed_kernels(kernels, resolved, world)
    with world.agreed():
        resolved = with_kernels(chosen, resolved, kernels.selected, world.device)
        announced = [*announce(config, resolved, world.device), *filter(None, [measured, kernels.told])]
        announced += announce_experts(config, resolved, world.device)
    return _Kernels(resolved, earlier, announced)


def _earlier_kernels(continued: Path | None) -> Kernels:
    """What computed each part in the run that is continued: torch, where its record is older than the choice."""
    return (from_text(resume.kernels(continued)) or dict.fromkeys(PARTS, "torch")) if continued else {}


def _initial_values(
    config: RunConfig, world: World, data: _Data, checkpoint: Checkpoint | None, reading: ExitStack
) -> InitialValue:
    """What the weights begin with. A run's own checkpoint wins over the one that it once began from, which is kept
    until `reading` is closed."""
    path = config.run.init_from or config.run.branch_from
    if checkpoint is not None or not path:
        return resume.resumed(checkpoint)
    source = open_verified(Path(path), world, reading)
    with world.agreed():
        if config.run.branch_from:
            return Branch(config, source, data.content_ids)
        return resume.Inherited(config, source)


def _open_engine(
    closings: ExitStack,
    config: RunConfig,
    world: World,
    engine_class: type[Engine],
    initial: InitialValue,
    resolved: Resolved,
) -> Engine:
    # Registered first: an engine that could not be built may already hold process groups.
    closings.push(lambda kind, error, trace: engine_class.leave_world(error))
    engine = engine_class(config, world, initial, resolved)
    closings.callback(engine.close)
    return engine


def _fill(session: Session, initial: InitialValue, checkpoint: Checkpoint | None) -> None:
    """Restore the new engine, or fill it with inherited weights."""
    if checkpoint:
        session.restore(checkpoint)
        with session.world.agreed():
            restore_watch(session.watch, checkpoint)
    elif isinstance(initial, Branch):
        session.branch_off(initial)
    elif isinstance(initial, resume.Inherited):
        initial.fill(session.engine)


def _open_reporter(
    closings: ExitStack, session: Session, journal: Journal, startup: Startup, parent: Parent | None
) -> Reporter:
    config, world = session.config, session.world
    memory = PeakMemory(world.device)
    throughput = Throughput(
        config,
        training_flops_per_token=flops_per_token(config).mfu,
        world_size=world.size,
        device=world.device,
        dtype=session.engine.dtype,
    )
    console = Console(
        config,
        config.run.steps,
        rank=world.rank,
        start_step=session.progress.step,
        memory_total_gib=memory.total_gib(),
        loss_average=session.loss_average,
    )
    closings.callback(console.close)
    profiler = Profiler(config, session.run_dir, world, console.warn)
    closings.callback(profiler.close)
    metrics = declared(config, session.engine.decoder).values()
    wandb_id, step = journal.record.wandb_id, session.progress.step
    beginning = Beginning(config, session.run_dir, wandb_id, step, console.warn, metrics, parent)
    sinks = open_sinks(beginning) if world.is_main else Sinks()
    closings.push(lambda kind, error, trace: sinks.close(_exit_code(error)))
    reporter = Reporter(journal, console, sinks, profiler, memory, throughput, metrics, startup)
    closings.push(lambda kind, error, trace: sum_up(session, reporter, error))
    return reporter


def _exit_code(error: BaseException | None) -> int:
    """The exit code for sinks; W&B shows a failed run as failed."""
    return error.exit_code if isinstance(error, KhaError) else int(error is not None)


def _open_saver(closings: ExitStack, session: Session, reporter: Reporter) -> Saver:
    saver = Saver(
        session.config,
        session.world,
        session.run_dir,
        sync=reporter.record.sync,
        event=reporter.checkpoint_event,
        stands=bool(session.resumed_from),
    )
    closings.push(saver.leave)
    return saver


def _changes(
    session: Session, kernels: _Kernels, initial: InitialValue, rate_change: dict[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, fields) of the events at the beginning of an attempt: everything that differs from the end of the last
    one.
    """
    if isinstance(initial, resume.Inherited):
        lists = {"taken": len(initial.taken), "new": initial.new, "left_out": initial.left_out}
        yield "weights_inherited", {"source": str(initial.checkpoint.path), **lists}
    if isinstance(initial, Branch):
        yield "branched", initial.facts()
    backend = kernels.resolved.backend.name
    if kernels.earlier_backend not in ("", backend):
        yield "attention_backend_changed", {"before": kernels.earlier_backend, "now": backend}
    if rate_change:
        yield "learning_rate_changed", rate_change


def _begin_attempt(
    session: Session,
    reporter: Reporter,
    kernels: _Kernels,
    changes: Iterator[tuple[str, dict[str, Any]]],
    branch: Branch | None,
) -> None:
    """Write the facts of this attempt, its configuration and its `changes` to the record; print the headline."""
    config, world, step = session.config, session.world, session.progress.step
    parameters = count_parameters(config)
    facts = {
        "data_content_id": session.stream.content_id,
        **measured_facts(session.tasks),
        "parameters": {"total": parameters.total, "active": parameters.active},
        "device": str(world.device.type),
        "dtype": str(session.engine.dtype).removeprefix("torch."),
        "peak": str(reporter.throughput.peak),
        "attention_backend": kernels.resolved.backend.name,
        "kernels": as_text(kernels_of(kernels.resolved)),
        "chosen": kernels.announced,
    }
    plain = Redactor.from_environment().clean(to_plain(config))
    parent = branch.parent if branch else None
    reporter.record.begin_attempt(
        step, world_size=world.size, facts=facts, config=plain, metrics=reporter.metrics, parent=parent
    )
    if world.is_main:
        write_text(session.run_dir / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False))
    for kind, fields in changes:
        reporter.record.event(kind, step, **fields)
    head = headline(config, world.size, step if session.resumed_from else None, facts, step if branch else 0)
    for line in filter(None, [*kernels.announced, time_warning(config), head]):
        reporter.console.message(line)
