"""Copies of a checkpoint in which some weights differ."""

# P the elements of one parameter

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint
from kha_train.distributed import World

Edit = Callable[[str, str, Tensor], Tensor]
"""(parameter, kind, its values [P]) -> the values of the copy."""


def unchanged(name: str, kind: str, values_P: Tensor) -> Tensor:
    """The values themselves."""
    return values_P


def rewritten(
    checkpoint: Checkpoint, run_dir: Path, edit: Edit = unchanged, state: dict[str, Any] | None = None
) -> Path:
    """A copy of `checkpoint` in `run_dir`, of the same step, with the values that `edit` returns, and with the trainer
    state `state` (None: the same); returns its directory. One parameter is in memory at a time, up to the
    size of a file.

    Raises CheckpointError when it cannot be read or written.
    """

    def pieces() -> Iterator[Piece]:
        for name, shape in checkpoint.names().items():
            for kind in checkpoint.kinds_of(name):
                yield Piece(name, kind, shape, 0, edit(name, kind, checkpoint.read(name, kind)))

    some_kinds = checkpoint.manifest.contents.some_kinds
    writer = BackgroundWriter(run_dir, World.single(), kinds=checkpoint.kinds, some_kinds=some_kinds)
    writer.begin(checkpoint.step, pieces(), checkpoint.buffers(), checkpoint.trainer_state if state is None else state)
    published = writer.wait()
    assert published is not None
    return published.path
