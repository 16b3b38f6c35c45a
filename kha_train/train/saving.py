"""When checkpoints are written during training, what training waits for, and what happens when a save fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from kha_train.checkpoint import layout
from kha_train.checkpoint.background import BackgroundWriter, Published
from kha_train.checkpoint.host_buffers import HostBuffers
from kha_train.checkpoint.manifest import Kinds
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.retention import Keep, prune
from kha_train.config.schema import RunConfig, StabilitySection
from kha_train.distributed import World, is_known_to_all
from kha_train.engine.contract import Engine
from kha_train.errors import CheckpointError, CorruptionError, DataError, MachineError
from kha_train.metric import Metric
from kha_train.record.columns_twin import TWIN_FILE, read_columns
from kha_train.record.files import size_of
from kha_train.record.reader import METRICS_FILE
from kha_train.train import resume
from kha_train.train.memory import as_memory_error

COLUMNS_EVERY = 16 * 2**20
"""Bytes of new lines in the record after which its columns are saved again."""


METRICS = (
    Metric(
        "checkpoint/stall_seconds",
        "s",
        "time training stood still for checkpoints since the line before (rank 0)",
        timing=True,
    ),
    Metric("checkpoint/failures", "count", "saves of this attempt that failed", timing=True),
)


class Saver:
    """The checkpoints of one attempt. Every method is collective and does the same on every rank.

    `sync` makes the record durable: rank 0 calls it before a checkpoint is published, so that no checkpoint is ahead of
    the record. `event` receives a kind, a step and fields for the record.

    A failed save does not affect training: it is recorded, and the next one is tried. `checkpoint.max_failures` in a
    row end the run, and so does a failure of the last save, with one error on all ranks: a MachineError if an earlier
    checkpoint `stands`, from which the run can continue, else a CheckpointError.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        run_dir: Path,
        *,
        sync: Callable[[], None],
        event: Callable[..., Any],
        stands: bool = False,
    ) -> None:
        self._config, self._world, self._event = config.checkpoint, world, event
        self._last_step, self._stability = config.run.steps, config.stability
        self._keep = Keep(self._config.keep_last, self._config.keep_every_steps)
        self._resumed_from: tuple[int, ...] = ()
        self._stands, self._run_dir = stands, run_dir
        self._writer = BackgroundWriter(
            run_dir,
            world,
            before_publish=sync,
            after_publish=self._after_publish,
            kinds=Kinds.of(config.optim),
        )
        self._host = HostBuffers()
        self._step = 0
        # The columns of an earlier start are nearly complete.
        self._columns_of = size_of(run_dir / METRICS_FILE) if (run_dir / TWIN_FILE).exists() else 0
        self._stall = self._stall_of_save = 0.0
        self._last_begun = time.monotonic()
        self._error: CheckpointError | None = None
        self.failures = self._failures_in_a_row = 0

    def due(self, step: int) -> bool:
        """Whether to write a checkpoint after `step`: by steps, by rank 0's clock, or because it is the last one."""
        if step == self._last_step or step % self._config.every_steps == 0:
            return True
        if self._config.every_minutes == 0:
            return False
        elapsed = time.monotonic() - self._last_begun >= 60 * self._config.every_minutes
        return bool(self._world.max_ints(int(self._world.is_main and elapsed))[0])

    def holds(self, step: int) -> bool:
        """Whether the last save is of `step`, and has not failed so far."""
        return self._step == step and self._error is None

    def begin(
        self, step: int, engine: Engine, trainer_state: dict[str, Any], resumed_from: tuple[int, ...] = ()
    ) -> None:
        """Take a snapshot and start writing it, after waiting for the previous save.

        Retention keeps the checkpoint of the step `resumed_from`, and the one that a rewind would need.
        """
        started = time.perf_counter()
        self._settle(self._writer.wait)
        self._resumed_from = resumed_from
        self._step, self._last_begun, self._stall_of_save = step, time.monotonic(), 0.0
        self._settle(lambda: self._begin(step, engine, trainer_state))
        if not self._config.background:
            self._settle(self._writer.wait)
        self._waited(started)

    def poll(self) -> None:
        """Once a step: notice a save that was published or has failed."""
        if self._writer.in_flight:
            started = time.perf_counter()
            self._settle(self._writer.poll)
            self._waited(started)

    def wait(self) -> None:
        """Wait until no save is in flight, before the run goes back to an older checkpoint."""
        self._settle(self._writer.wait)

    def finish(self) -> None:
        """Wait for the save in flight. Raises MachineError or CheckpointError when the last one begun failed."""
        started = time.perf_counter()
        self._settle(self._writer.wait)
        self._waited(started)
        if self._error is not None:
            self._give_up(self._error)

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """At the end of the attempt: complete the save in flight, unless this rank fails alone (others may be gone) or
        the saved values are in doubt.
        """
        if error is None or (is_known_to_all(error) and not isinstance(error, CorruptionError)):
            self._settle(self._writer.wait, final=True)
        else:
            self._writer.abandon()

    def take_stall(self) -> float:
        """Seconds that training paused for checkpoints since the last call."""
        seconds, self._stall = self._stall, 0.0
        return seconds

    def _begin(self, step: int, engine: Engine, trainer_state: dict[str, Any]) -> None:
        pieces: Iterable[Piece]
        with self._world.agreed("copy the state to host memory", CheckpointError), as_memory_error():
            if self._config.background:
                self._host.restart()
                pieces = list(resume.pieces(engine, self._host.copy))
                buffers = {name: self._host.copy(buffer) for name, buffer in engine.buffers().items()}
                self._host.synchronize()
            else:
                pieces = resume.pieces(engine)
                buffers = {name: buffer.cpu() for name, buffer in engine.buffers().items()}
        self._writer.begin(step, pieces, buffers, trainer_state)

    def _settle(self, work: Callable[[], Published | None], final: bool = False) -> None:
        try:
            published = work()
        except CheckpointError as error:
            self._error = error
            self.failures += 1
            self._failures_in_a_row += 1
            self._event("checkpoint_failed", self._step, problem=str(error), in_a_row=self._failures_in_a_row)
            if self._failures_in_a_row >= self._config.max_failures and not final:
                self._give_up(error)
            return
        if published is not None:
            self._error, self._failures_in_a_row, self._stands = None, 0, True
            self._event(
                "checkpoint_saved", published.step, seconds=published.seconds, stall_seconds=self._stall_of_save
            )

    def _give_up(self, error: CheckpointError) -> NoReturn:
        if not self._stands:
            raise error
        problem = f"the checkpoint of step {self._step} was not written, but an earlier one exists: {error}"
        told = MachineError(problem, fix="check the disk; the same command continues from there")
        told.agreed = True
        raise told from error

    def _waited(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self._stall += seconds
        self._stall_of_save += seconds

    def _after_publish(self) -> None:
        """Retention after a save, in the background. What cannot be deleted now is tried again after the next one; the
        save itself is published. The columns of a long record are saved here, so that its end need not parse it.
        """
        with suppress(OSError):
            spared = {*self._resumed_from, *_steps_of_a_rewind(self._stability, self._run_dir, self._step)}
            prune(self._run_dir, replace(self._keep, steps=frozenset(spared)))
        with suppress(OSError, DataError, MemoryError):
            size = size_of(self._run_dir / METRICS_FILE)
            if size - self._columns_of >= COLUMNS_EVERY:
                self._columns_of = size
                read_columns(self._run_dir)


def _steps_of_a_rewind(options: StabilitySection, run_dir: Path, now: int) -> list[int]:
    """The step of the checkpoint that a rewind would go back to if a spike began at step `now`.

    Raises OSError when the directory cannot be read.
    """
    if options.policy != "rewind":
        return []
    horizon = now - options.rewind.margin - options.rewind.after
    return [step for step, _ in layout.candidates(run_dir / layout.FOLDER) if step <= horizon][:1]
