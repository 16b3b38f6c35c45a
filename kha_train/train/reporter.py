"""Reports a run while it trains: the line of each step and the events go to the record, then to its mirrors.

The record comes first; console and sinks show what it holds. A rank that cannot write the record must not raise alone
while the others wait: the `Journal` keeps the error, and the loop passes it to the next agreement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kha_train.config.schema import RunConfig
from kha_train.distributed import as_error
from kha_train.metric import Metric
from kha_train.record import Record
from kha_train.telemetry.console import Console
from kha_train.telemetry.meters import DataWait, PeakMemory
from kha_train.telemetry.profiler import Profiler
from kha_train.telemetry.sinks import Sinks
from kha_train.telemetry.startup import Startup
from kha_train.telemetry.throughput import Throughput
from kha_train.train.probe import probe_metrics
from kha_train.train.saving import Saver
from kha_train.train.session import Session
from kha_train.train.step import StepResult, routing_metrics
from kha_train.train.watch import ANNOUNCED, describe

T = TypeVar("T")
LINE = (
    Metric("samples_first", "row", "first global sample number of the step's batch"),
    Metric("samples_last", "row", "last global sample number of the step's batch"),
    Metric(
        "tokens", "tokens", "places read since step 0: rows of the global batch x sequence length, padding included"
    ),
    Metric(
        "train/loss",
        "nats/token",
        "token cross-entropy summed over the global batch / its unmasked labels; no auxiliary term",
    ),
    Metric("train/grad_norm", "1", "L2 norm of the gradient over all parameters and ranks, before clipping"),
    Metric(
        "train/grad_clipped",
        "0/1",
        "1 when the norm was above optim.grad_clip, or ZClip's limit, and the gradient was scaled down",
    ),
    Metric("train/skipped", "0/1", "1 when the update was not applied (not finite, or refused by stability.policy)"),
    Metric("train/skipped_steps", "steps", "updates not applied since step 0"),
    Metric("train/lr", "1", "learning rate of the step"),
    Metric("train/step_seconds", "s", "wall time of the step, waiting for data included", timing=True),
)
"""What `Reporter.line` has of its own; the rest is declared where it is computed."""


class Journal:
    """Writes the record without raising OSError. `trouble` is the first failure; all ranks learn of it at the next
    agreement.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.trouble: BaseException | None = None

    def step(self, line: dict[str, Any]) -> None:
        """As `Record.step`."""
        self._write(lambda: self.record.step(line), None)

    def event(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        """As `Record.event`; an empty dict if nothing could be written."""
        return self._write(lambda: self.record.event(kind, step, **fields), {})

    def update_run(self, **fields: Any) -> None:
        """As `Record.update_run`."""
        self._write(lambda: self.record.update_run(**fields), None)

    def _write(self, write: Callable[[], T], otherwise: T) -> T:
        try:
            return write()
        except OSError as error:
            self.trouble = self.trouble or as_error(error, "write the record")
            return otherwise


@dataclass
class Reporter:
    """The record of one attempt and its mirrors; silent on ranks other than 0."""

    journal: Journal
    console: Console
    sinks: Sinks
    profiler: Profiler
    memory: PeakMemory
    throughput: Throughput
    metrics: Collection[Metric]
    """The metrics that lines of this run may hold."""
    startup: Startup | None
    """The phases since the start of the process; None once they are recorded."""
    data_wait: DataWait = field(default_factory=DataWait)
    """Measures reading the batch of a step and agreeing on it."""

    @property
    def record(self) -> Record:
        """The record itself, for writes that all ranks agree on."""
        return self.journal.record

    @property
    def trouble(self) -> BaseException | None:
        """Why this rank could not write the record; None while it can."""
        return self.journal.trouble

    def line(self, session: Session, saver: Saver, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
        """The line of the record for the step just finished (see `train/metrics.py`)."""
        seen, progress = session.watch.seen, session.progress
        return {
            "step": progress.step,
            "samples_first": seen.samples_first,
            "samples_last": seen.samples_last,
            "tokens": progress.tokens,
            "train/loss": result.loss,
            "train/grad_norm": seen.grad_norm,
            "train/grad_clipped": int(result.applied and session.watch.clipped),
            "train/skipped": int(not result.applied),
            "train/skipped_steps": progress.skipped_steps,
            "train/lr": lr,
            "train/step_seconds": seconds,
            **self.throughput.rates(session.tokens_of(progress.step), seconds),
            "data/wait_seconds": (waited := session.stream.take_wait_seconds()),
            "data/agreement_seconds": max(0.0, self.data_wait.take() - waited),
            "checkpoint/stall_seconds": saver.take_stall(),
            "checkpoint/failures": saver.failures,
            "memory/peak_gib": self.memory.gib(),
            **({} if result.padding is None else {"data/padding": result.padding}),
            **routing_metrics(session.config.moe, result),
            **result.values,
            **session.watch.metrics(),
            **(probe_metrics(result.evidence) if result.evidence else {}),
        }

    def note_startup(self) -> None:
        """After the first step: write the phases since the start of the process to `run.json`."""
        if self.startup is not None:
            self.startup.mark("first step")
            seconds, self.startup = self.startup.seconds, None
            self.journal.update_run(startup_seconds=seconds)

    def report(self, line: dict[str, Any], happenings: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Record the line of a step and its events (kind, fields), and show both in the mirrors."""
        self.journal.step(line)
        if self.trouble:
            return
        self.console.step(line)
        self.sinks.step(line)
        for kind, fields in happenings:
            self.happened(kind, line["step"], **fields)

    def happened(self, kind: str, step: int, **fields: Any) -> None:
        """Record an event of `step`, and send it to the sinks; some are printed on the console."""
        event = self.journal.event(kind, step, **fields)
        # Clipping is frequent: in sinks it is a curve, and leaves the marks to rarer actions.
        if kind != "zclip":
            self.sinks.event(event)
        if kind in ANNOUNCED:
            self.console.warn(describe(kind, step, fields))

    def checkpoint_event(self, kind: str, step: int, **fields: Any) -> None:
        """Record the end of a save (`checkpoint_saved`, `checkpoint_failed`), and show it in the mirrors."""
        self.sinks.event(self.journal.event(kind, step, **fields))
        if kind == "checkpoint_saved":
            self.console.checkpoint_saved(step)
        else:
            self.console.warn(f"the checkpoint of step {step} failed, training continues: {fields['problem']}")


def headline(
    config: RunConfig, world_size: int, resumed_after: int | None, facts: dict[str, Any], branched_after: int = 0
) -> str:
    """The line that a start prints: the run, the step after which it resumes (None: a new run) or begins as a branch
    (0: none), and what the record's `facts` say of model and machine."""
    parameters = facts["parameters"]
    # A user who allows changes may have meant another directory.
    new = "new run (nothing to resume here; to continue another run, give its run.dir)"
    new = new if config.resume.allow_changes else "new run"
    where = new if resumed_after is None else f"resumed after step {resumed_after}"
    where = f"branch of {config.run.branch_from}, after step {branched_after}" if branched_after else where
    sharing = {"experts": config.engine.expert_parallel, "rows": config.engine.context_parallel}
    shared = "".join(f", {what} shared by {ranks} ranks" for what, ranks in sharing.items() if ranks > 1)
    return (
        f"{config.run.name}: {where} of {config.run.steps} in {config.run.dir} | "
        f"{parameters['total']:,} parameters, {parameters['active']:,} active | {world_size} x {facts['device']}, "
        f"{facts['dtype']}, ZeRO {config.engine.zero_stage}{shared} | MFU of {facts['peak']}"
    )
