"""Where a run stands, how that is saved, and whether a checkpoint belongs to the configuration it is resumed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
    "cluster.",
)
"""Settings that may differ on resume: they change neither the model, nor the samples, nor the optimiser.

The paths of the data may change, its content may not: that is compared by content id.
"""


@dataclass(frozen=True)
class Progress:
    """How far a run is: finished optimiser steps (skipped ones included), samples passed and tokens trained on.

    `samples_seen` is where the stream stands, `skip_windows` the sample numbers [first, last) it passes over.
    """

    step: int = 0
    samples_seen: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skip_windows: tuple[tuple[int, int], ...] = ()

    def after(self, samples_seen: int, tokens: int, applied: bool) -> Progress:
        """The progress after one more step of `tokens` tokens, which left the stream at `samples_seen`."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=samples_seen,
            tokens=self.tokens + tokens,
            skipped_steps=self.skipped_steps + (not applied),
        )

    @property
    def next_sample(self) -> int:
        """The first sample of the next step: where the stream stands, or the end of the skip window it stands in."""
        sample = self.samples_seen
        for first, last in sorted(self.skip_windows):
            sample = last if first <= sample < last else sample
        return sample

    def to_plain(self) -> dict[str, Any]:
        """As trainer state, which knows lists and no tuples."""
        return {**asdict(self), "skip_windows": [list(window) for window in self.skip_windows]}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Progress:
        """The inverse of `to_plain`."""
        return Progress(**{**values, "skip_windows": tuple((first, last) for first, last in values["skip_windows"])})


def trainer_state(
    config: RunConfig, engine: Engine, progress: Progress, content_id: str, stability: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; `stability` is the state of the `Watch`."""
    return {
        "progress": progress.to_plain(),
        "stability": stability,
        "optimizer_steps": engine.optimizer_steps,
        "data_content_id": content_id,
        "config": to_plain(config),
    }


def pieces(engine: Engine, to_host: Callable[[Tensor], Tensor] = Tensor.cpu) -> Iterator[Piece]:
    """This rank's share of masters and moments as a checkpoint stores it; `to_host` brings a 1-D view to the CPU."""
    for fragment in engine.fragments():
        for kind, view in fragment.views.items():
            yield Piece(fragment.name, kind, fragment.shape, fragment.start, to_host(view))


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
    """Put masters, moments, buffers and step counters of `checkpoint` into `engine`, bit for bit. Collective."""
    with torch.no_grad():
        for fragment in engine.fragments():
            for kind, view in fragment.views.items():
                view.copy_(checkpoint.read(fragment.name, kind, fragment.start, view.numel()))
        saved = checkpoint.buffers()
        for name, buffer in engine.buffers().items():
            buffer.copy_(saved[name])
    engine.refresh_parameters()
    state = checkpoint.trainer_state
    engine.optimizer_steps = state["optimizer_steps"]
    return Progress.from_plain(state["progress"])
