"""Copies of the state of the last steps in memory, so that a loss event has a saved state near its beginning.

Every `checkpoint.ring_steps` steps the state is copied to host memory; the last two copies are kept. When an event
opens, both are written as checkpoints to `<run.dir>/ring`: it begins at most `ring_steps` steps after the newer one,
and its cause may lie before that. `kha replay` starts from them. Resume does not read them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.host_buffers import HostBuffers
from kha_train.checkpoint.layout import FOLDER, RING, candidates, remove
from kha_train.checkpoint.manifest import Kinds
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.retention import Keep, prune
from kha_train.checkpoint.trainer_state import decode_state, encode_state
from kha_train.config.constants import RING_COPIES, RING_KEPT
from kha_train.engine.contract import Engine
from kha_train.errors import CheckpointError
from kha_train.train import resume
from kha_train.train.memory import as_memory_error
from kha_train.train.session import Session


@dataclass
class Copy:
    """This rank's share of the state after `step`, in host memory that is used again by the next `take`. `state` is
    trainer.json (empty on ranks other than 0)."""

    host: HostBuffers = field(default_factory=HostBuffers)
    step: int = -1
    pieces: list[Piece] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    state: bytes = b""

    def take(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        """Copy the state of `engine`; from a GPU the copy goes on while the host does. Local. Raises MemoryError."""
        self.host.restart()
        self.pieces = list(resume.pieces(engine, self.host.copy))
        self.buffers = {name: self.host.copy(buffer) for name, buffer in engine.buffers().items()}
        self.state = encode_state(state) if engine.world.is_main else b""
        self.step = step


class Ring:
    """The ring of one attempt. `after` is collective. `event` receives a kind, a step and fields for the record.

    A ring that lacks memory, or whose checkpoints cannot be written, never affects training: it is recorded, and the
    ring is given up in the first case.
    """

    def __init__(self, session: Session, event: Callable[..., Any]) -> None:
        self._session, self._event = session, event
        self._every = session.config.checkpoint.ring_steps
        self._copies: list[Copy] = []
        self._folder = session.run_dir / RING
        self.forget()

    def after(self, step: int) -> None:
        """After `step`: write the copies if an event opened with it; take one if it is due and no event is open."""
        if not self._every:
            return
        verdict, event = self._session.watch.verdict, self._session.watch.event
        if verdict is not None and verdict.opened:
            self._write(step)
        elif step % self._every == 0 and event is None:
            self._take(step)

    def forget(self) -> None:
        """The run stands at another step than before: drop what belongs to later ones."""
        step, world = self._session.progress.step, self._session.world
        self._copies = [copy for copy in self._copies if copy.step <= step]
        if world.is_main:
            with suppress(OSError):
                for at, path in candidates(self._folder / FOLDER):
                    if at > step:
                        remove(path, at)

    def _take(self, step: int) -> None:
        session, world = self._session, self._session.world
        copy = self._copies.pop(0) if len(self._copies) == RING_COPIES else Copy()
        try:
            with world.agreed("copy the state to host memory", CheckpointError), as_memory_error():
                copy.take(session.engine, step, session.state() if world.is_main else {})
        except CheckpointError as error:
            self._every, self._copies = 0, []
            self._event("ring_given_up", step, problem=str(error))
            return
        self._copies.append(copy)

    def _write(self, step: int) -> None:
        world, config = self._session.world, self._session.config
        written: list[int] = []
        if world.is_main:
            # What cannot be listed is written again: a failure there is reported to all ranks.
            with suppress(OSError):
                written = [at for at, _ in candidates(self._folder / FOLDER)]
        for copy in self._copies:
            (there,) = world.max_ints(int(copy.step in written))
            if there:
                continue
            copy.host.synchronize()
            writer = BackgroundWriter(
                self._folder,
                world,
                after_publish=self._prune,
                kinds=Kinds.of(config.optim),
            )
            state = decode_state(copy.state, "the ring") if world.is_main else {}
            try:
                writer.begin(copy.step, copy.pieces, copy.buffers, state)
                writer.wait()
            except CheckpointError as error:
                self._event("ring_failed", step, problem=str(error))
                return
        if self._copies:
            self._event("ring_saved", step, steps=[copy.step for copy in self._copies])

    def _prune(self) -> None:
        with suppress(OSError):
            prune(self._folder, Keep(RING_KEPT))
