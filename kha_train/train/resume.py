"""Where a run stands, how that is saved, and whether a checkpoint belongs to the configuration it is resumed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.build import flatten, to_plain
from kha_train.config.schema import RunConfig
from kha_train.engine.deepspeed import Engine, InitialValue, seeded
from kha_train.errors import ResumeError

FREE_TO_CHANGE = (
    "run.dir",
    "run.name",
    "attention.name",
    "attention.backend",
    "model.name",
    "model.loss_chunk_tokens",
    "moe.backend",
    "data.name",
    "data.train",
    "data.validation",
    "data.reader",
    "data.prefetch",
    "data.check_crc",
    "engine.",
    "checkpoint.",
    "validation.",
    "stability.",
    "telemetry.",
)
"""Settings that may differ on resume: they change neither the model, nor the samples, nor the optimiser.

The paths of the data may change, its content may not: that is compared by content id.
"""


@dataclass(frozen=True)
class Progress:
    """How far a run is: finished optimiser steps (skipped ones included), samples and tokens consumed."""

    step: int = 0
    samples_seen: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0

    def after(self, rows: int, seq_len: int, applied: bool) -> Progress:
        """The progress after one more step of `rows` samples of `seq_len` tokens."""
        return Progress(
            step=self.step + 1,
            samples_seen=self.samples_seen + rows,
            tokens=self.tokens + rows * seq_len,
            skipped_steps=self.skipped_steps + (not applied),
            nonfinite_in_a_row=0 if applied else self.nonfinite_in_a_row + 1,
        )


def trainer_state(config: RunConfig, engine: Engine, progress: Progress, content_id: str) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {
        "progress": asdict(progress),
        "optimizer_steps": engine.optimizer_steps,
        "data_content_id": content_id,
        "config": to_plain(config),
    }


def pieces(engine: Engine) -> Iterator[Piece]:
    """This rank's share of masters and moments as a checkpoint stores it."""
    for fragment in engine.fragments():
        for kind, view in fragment.views.items():
            yield Piece(fragment.name, kind, fragment.shape, fragment.start, view.cpu())


def check_belongs(config: RunConfig, checkpoint: Checkpoint, content_id: str) -> None:
    """Raises ResumeError when `checkpoint` was made by another model, other data or another schedule."""
    state = checkpoint.trainer_state
    saved, now = flatten(state["config"]), flatten(to_plain(config))
    differing = [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if state["data_content_id"] != content_id:
        differing.append(f"data content: {state['data_content_id'][:12]} -> {content_id[:12]}")
    if differing:
        raise ResumeError(
            f"the checkpoint of step {checkpoint.step} belongs to another run ({'; '.join(differing)})",
            field="run.dir",
            value=config.run.dir,
            fix="restore the old settings, or start a new run with another run.dir",
        )


def initial_from(checkpoint: Checkpoint | None) -> InitialValue:
    """Values to materialise the decoder with: the checkpoint's masters, or the seeded defaults without one."""
    if checkpoint is None:
        return seeded
    shapes = checkpoint.names()
    return lambda name, default: checkpoint.read(name, "master").view(shapes[name])


def restore(engine: Engine, checkpoint: Checkpoint) -> Progress:
    """Put masters, moments, buffers and step counters of `checkpoint` into `engine`, bit for bit."""
    with torch.no_grad():
        for fragment in engine.fragments():
            for kind, view in fragment.views.items():
                view.copy_(checkpoint.read(fragment.name, kind, fragment.start, view.numel()))
        saved = checkpoint.buffers()
        for name, buffer in engine.buffers().items():
            buffer.copy_(saved[name])
    state = checkpoint.trainer_state
    engine.optimizer_steps = state["optimizer_steps"]
    return Progress(**state["progress"])
