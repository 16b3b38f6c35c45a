"""Copies of a checkpoint in which some weights differ, or the state of the trainer."""

# P the elements of one parameter

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kha_train.checkpoint import layout
from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.manifest import MANIFEST_FILE, TRAINER_FILE
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint
from kha_train.checkpoint.tensor_file import entry_of, write_bytes
from kha_train.checkpoint.trainer_state import encode_state
from kha_train.checkpoint.writer import publish
from kha_train.distributed import World
from kha_train.record.files import sync_directory

Edit = Callable[[str, str, Tensor], Tensor]
"""(parameter, kind, its values [P]) -> the values of the copy."""


def rewritten(checkpoint: Checkpoint, run_dir: Path, edit: Edit) -> Path:
    """A copy of `checkpoint` in `run_dir`, of the same step, with the values that `edit` returns; returns its
    directory. One parameter is in memory at a time, up to the size of a file.

    Raises CheckpointError when it cannot be read or written.
    """

    def pieces() -> Iterator[Piece]:
        for name, shape in checkpoint.names().items():
            for kind in checkpoint.kinds_of(name):
                yield Piece(name, kind, shape, 0, edit(name, kind, checkpoint.read(name, kind)))

    writer = BackgroundWriter(run_dir, World.single(), kinds=checkpoint.manifest.contents.kinds)
    writer.begin(checkpoint.step, pieces(), checkpoint.buffers(), checkpoint.trainer_state)
    published = writer.wait()
    assert published is not None
    return published.path


def with_state(checkpoint: Checkpoint, run_dir: Path, state: dict[str, Any]) -> Path:
    """A checkpoint in `run_dir` with the tensors of `checkpoint` and the trainer state `state`; returns its directory.
    Its tensor files are hard links, which take no room, and copies where the file system has none. What is there
    already is not written again. Raises OSError.
    """
    encoded = encode_state(state)
    contents = checkpoint.manifest.contents
    files = contents.files | {TRAINER_FILE: entry_of(encoded)}
    manifest = replace(checkpoint.manifest, contents=replace(contents, files=files)).encode()
    folder = run_dir / layout.FOLDER
    made = folder / layout.step_name(checkpoint.step)
    if (made / MANIFEST_FILE).is_file() and (made / MANIFEST_FILE).read_bytes() == manifest:
        return made
    folder.mkdir(parents=True, exist_ok=True)
    layout.clear_leftovers(folder, "saving")
    temporary = folder / layout.temporary_name(checkpoint.step, "saving")
    temporary.mkdir()
    for name in contents.files.keys() - {TRAINER_FILE}:
        _link(checkpoint.path / name, temporary / name)
    write_bytes(temporary / TRAINER_FILE, encoded)
    write_bytes(temporary / MANIFEST_FILE, manifest)
    sync_directory(temporary)
    publish(temporary, made, checkpoint.step)
    return made


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
