"""Checkpoints written in the background. Threads only touch files; collectives run in the main threads.

    begin      main threads: agree on a name, copy the state to host memory, start the thread
    (thread)   every rank writes its own files
    poll       main threads, once a step: has every rank written? did any fail?
    (thread)   rank 0 joins, publishes, and prunes
    poll       main threads: the checkpoint is published

Collectives of a thread and of training could run in a different order on each rank, so threads start none. A save keeps
one snapshot of this rank's share in memory, and only one save is in flight.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kha_train.checkpoint.manifest import UNNAMED, Kinds
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.writer import PART_BYTES, Save, Stage, encode_on_main, no_stage
from kha_train.distributed import Caught, World
from kha_train.errors import CheckpointError, KhaError


@dataclass(frozen=True)
class Published:
    """A published checkpoint: its step, its directory, and the seconds from the snapshot to publication."""

    step: int
    path: Path
    seconds: float


class BackgroundWriter:
    """Writes the checkpoints of `run_dir`, one at a time, in a thread of each rank.

    `before_publish` (make the record durable) and `after_publish` (prune) run in rank 0's thread. `stage` is called
    at each `Stage`, for fault tests. `part_bytes` is the file size at which a rank starts another file.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        before_publish: Callable[[], None] = lambda: None,
        after_publish: Callable[[], None] = lambda: None,
        kinds: Kinds = UNNAMED,
        stage: Callable[[Stage], None] = no_stage,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._run_dir, self._world, self._stage, self._part_bytes = run_dir, world, stage, part_bytes
        self._before_publish, self._after_publish, self._kinds = before_publish, after_publish, kinds
        self._save: Save | None = None
        self._job: _Job | None = None
        self._publishing = False
        self._started = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a save is in flight; the same on every rank."""
        return self._save is not None

    def begin(
        self, step: int, pieces: Iterable[Piece], buffers: dict[str, Tensor], trainer_state: dict[str, Any]
    ) -> None:
        """Start writing. Collective; no save may be in flight.

        The thread reads `pieces` and `buffers`, so they must not change until `poll` or `wait` has returned the
        checkpoint: pass copies of anything that training changes. Raises CheckpointError on all ranks.
        """
        assert self._save is None, "one save at a time"
        self._started = time.perf_counter()
        encoded = encode_on_main(self._world, trainer_state)
        save = Save(
            self._run_dir,
            step,
            self._world,
            encoded,
            kinds=self._kinds,
            stage=self._stage,
            part_bytes=self._part_bytes,
        )
        with self._world.agreed("prepare the checkpoint", CheckpointError):
            save.prepare()
        self._save, self._publishing = save, False
        self._job = _Job(lambda: save.write_share(pieces, buffers))

    def poll(self) -> Published | None:
        """Once a step: the checkpoint if it has been published, None while a save is in flight or when there is none.

        Collective. Raises CheckpointError on all ranks when the save failed, after removing its files.
        """
        if self._job is None:
            return None
        (running,) = self._world.max_ints(int(self._job.running))
        return None if running else self._advance()

    def wait(self) -> Published | None:
        """Wait for the save in flight and return its checkpoint; None when there is none. Collective; raises as `poll`
        does.
        """
        published = None
        while self._job is not None:
            self._join()
            published = self._advance()
        return published

    def abandon(self) -> None:
        """Let this rank's thread end without asking the other ranks, which may be gone. Nothing is published any
        more.
        """
        if self._job is not None:
            self._join()
        self._save = self._job = None

    def _join(self) -> None:
        """Wait for this rank's thread; report progress to the watchdog while it advances."""
        assert self._save is not None and self._job is not None
        moves = -1
        while self._job.running:
            if self._save.moves != moves:
                moves = self._save.moves
                self._world.alive()
            self._job.join(1.0)

    def _advance(self) -> Published | None:
        """After this rank's job has ended: check that it succeeded on all ranks, then start the next stage or
        finish.
        """
        save, job = self._save, self._job
        assert save is not None and job is not None
        try:
            doing = "publish" if self._publishing else "write"
            with self._world.agreed(f"{doing} the checkpoint", CheckpointError):
                if job.error is not None:
                    raise job.error
        except KhaError:
            self._save = self._job = None
            save.clear()
            raise
        if not self._publishing:
            self._publishing, self._job = True, _Job(lambda: self._publish(save))
            return None
        self._save = self._job = None
        return Published(save.step, save.path, time.perf_counter() - self._started)

    def _publish(self, save: Save) -> None:
        if self._world.is_main:
            self._before_publish()
            save.publish()
            self._after_publish()


def write(
    run_dir: Path,
    step: int,
    world: World,
    pieces: Iterable[Piece],
    buffers: dict[str, Tensor],
    trainer_state: dict[str, Any],
    *,
    stage: Callable[[Stage], None] = no_stage,
    part_bytes: int = PART_BYTES,
) -> Path:
    """Publish one checkpoint and wait for it; returns its directory.

    Collective. Raises CheckpointError on all ranks. The files of a failed save are removed; earlier checkpoints are
    untouched.
    """
    writer = BackgroundWriter(run_dir, world, stage=stage, part_bytes=part_bytes)
    writer.begin(step, pieces, buffers, trainer_state)
    published = writer.wait()
    assert published is not None
    return published.path


class _Job:
    """A thread that runs one function and keeps its exception for the main thread."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body
        self._error: BaseException | None = CheckpointError("the writing thread died")
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """The exception of the function; None when it succeeded. Call only after it has ended."""
        return self._error

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        with Caught() as caught:
            self._body()
        self._error = caught.error
        if caught.error is not None and not isinstance(caught.error, KhaError | OSError | MemoryError):
            # A bug here costs a checkpoint and not the run, but it must be visible.
            traceback.print_exception(caught.error, file=sys.stderr)
            self._error = CheckpointError(f"the writing thread died: {type(caught.error).__name__}: {caught.error}")
