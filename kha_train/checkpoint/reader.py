"""Finds the newest checkpoint that verifies, and reads any slice of any parameter from it.

Verification reads every byte. The files are divided among the ranks, and all ranks agree on the outcome. Files are only
ever parsed as JSON or safetensors.
"""

# N elements asked for

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kha_train.checkpoint import layout
from kha_train.checkpoint.hold import held
from kha_train.checkpoint.loss import lost_checkpoints
from kha_train.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    TRAINER_FILE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from kha_train.checkpoint.trainer_state import decode_state
from kha_train.distributed import World
from kha_train.errors import CheckpointError, FormatError, KhaError

_CHUNK_BYTES = 16 * 2**20
_NONE = "none"

OF_DEEPSPEED = ("global_step*", "mp_rank_*", "*zero_pp_rank_*")
"""Names of what DeepSpeed writes by itself."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose manifest has been read. `read` and `buffers` open files when called."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Finished optimiser steps at the time of the save."""
        return self.manifest.step

    @cached_property
    def trainer_state(self) -> dict[str, Any]:
        """The `trainer_state` given to the writer, with bit-identical floats. Raises CheckpointError, OSError."""
        path = self.path / TRAINER_FILE
        return decode_state(path.read_bytes(), str(path))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of parameters: the fp32 master and the optimiser's states."""
        return self.manifest.contents.kinds.names

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """What is stored of the parameter `name`: `kinds`, or some of them."""
        return tuple(self.manifest.contents.parameters[name].pieces)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and their global shapes."""
        return {name: entry.shape for name, entry in self.manifest.contents.parameters.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Every stored buffer, whole, on the CPU. Raises CheckpointError when a file does not match the manifest."""
        return {
            name: _read_slice(self.path / entry.file, entry.key, entry.dtype, entry.shape, None)
            for name, entry in self.manifest.contents.buffers.items()
        }

    def read(self, name: str, kind: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements `start` .. `start + length` [N] (1-D, fp32, CPU) of the flattened parameter `name`.

        `kind` is one of `kinds_of(name)`; without `length`, reads to the end. Reads only the requested bytes, from the
        pieces that hold them. Raises CheckpointError for an unknown name or kind, and when a file does not match the
        manifest.
        """
        entry = self.manifest.contents.parameters.get(name)
        if entry is None:
            raise CheckpointError("no such parameter", field=str(self.path), value=name)
        if kind not in entry.pieces:
            allowed = ", ".join(entry.pieces)
            raise CheckpointError(f"no such kind of {name}", field=str(self.path), value=kind, allowed=allowed)
        length = entry.elements - start if length is None else length
        assert 0 <= start and 0 <= length and start + length <= entry.elements, (name, start, length, entry.shape)
        values_N = torch.empty(length)
        for piece in entry.pieces[kind]:
            first, last = max(start, piece.start), min(start + length, piece.start + piece.length)
            if first < last:
                wanted = slice(first - piece.start, last - piece.start)
                path = self.path / piece.file
                values_N[first - start : last - start] = _read_slice(path, piece.key, "F32", (piece.length,), wanted)
        return values_N


def find_newest(
    run_dir: Path, world: World, report: Callable[[str], None], at_most: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint of `run_dir` that verifies, or None when there is none. Collective.

    With `at_most`, only checkpoints of this step or earlier count.

    A checkpoint that fails is reported in one sentence on every rank. Rank 0 renames it to `step-N.corrupt`, or leaves
    it in place when the directory cannot be written, and the next older one is tried. Raises on all ranks: MachineError
    when a rank could not read the files (a disk failure is no reason to give up a checkpoint), FormatError when the
    newest has an unknown format.
    """
    folder = Path(run_dir) / layout.FOLDER
    refused: set[str] = set()
    while True:
        name, step = _NONE, -1
        with world.agreed(f"list {folder}"):
            if world.rank == 0:
                left = [
                    (step, path.name)
                    for step, path in layout.candidates(folder)
                    if path.name not in refused and (at_most is None or step <= at_most)
                ]
                step, name = left[0] if left else (step, name)
        name = world.broadcast_text(name)
        if name == _NONE:
            return None
        fix = f"if it stays unreadable, move {folder / name} aside: the previous checkpoint is used then"
        checkpoint, reason = _verify_together(folder / name, world, fix)
        if checkpoint is not None:
            return checkpoint
        refused.add(name)
        kept = _set_aside(folder / name, step) if world.rank == 0 else ""
        kept = world.broadcast_text(kept)
        report(f"checkpoint {name} does not verify and is not used: {reason}. {kept}. Trying the next older one.")


def open_verified(path: Path, world: World, hold: ExitStack | None = None) -> Checkpoint:
    """The checkpoint in `path`, a step directory or a run directory (its newest). Collective; nothing is renamed.
    With `hold`, the run that it belongs to does not remove it until that is closed.

    Raises CheckpointError on all ranks when there is none or it fails verification; otherwise as `find_newest`.
    """
    directory = path
    with world.agreed(f"list {path}"):
        if world.is_main:
            directory = directory_of(path)
    directory = Path(world.broadcast_text(str(directory)))
    if hold is not None:
        with world.agreed(f"read {directory}"):
            hold.enter_context(held(directory))
    checkpoint, reason = _verify_together(directory, world)
    if checkpoint is None:
        raise CheckpointError(f"cannot be used: {reason}", field=str(path))
    return checkpoint


def directory_of(path: Path) -> Path:
    """The step directory that `path` names: itself, or of a run directory that of its newest checkpoint.

    Raises CheckpointError when there is none, FormatError for one that DeepSpeed wrote by itself, DataError when the
    events of the run are damaged, OSError.
    """
    if not path.is_dir():
        raise CheckpointError("no such directory", field=str(path), allowed="a checkpoint, or a run that has one")
    if problem := lost_checkpoints(path):
        raise CheckpointError(problem, field=str(path), fix=f"mount or restore {path / layout.FOLDER}")
    found = layout.candidates(path / layout.FOLDER)
    if not found and any(next(path.glob(pattern), None) for pattern in OF_DEEPSPEED):
        raise FormatError(
            "a checkpoint of DeepSpeed itself: pickles, bound to one number of ranks, which are never read",
            field=str(path),
            allowed="a run of this trainer, or a step of it",
            fix="name RUN or RUN/checkpoints/step-XXXXXXXX",
            code="E09",
        )
    return found[0][1] if found else path


def verify(directory: Path, world: World | None = None) -> Manifest:
    """Check a checkpoint directory: manifest, names, sizes, and the SHA-256 of this rank's share of the files.

    Local; without `world` this process checks all files. Raises CheckpointError naming the file, the expected and the
    found value; FormatError for an unknown format; OSError when the files cannot be read, which says nothing about
    their content.
    """
    world = world or World.single()
    manifest = check_sizes(directory)
    for name in sorted(manifest.contents.files)[world.rank :: world.size]:
        _check_hash(directory / name, manifest.contents.files[name], world.alive)
    return manifest


def check_sizes(directory: Path) -> Manifest:
    """The manifest of a directory that holds exactly the listed files, all regular and of the right size; does not
    hash.

    Raises CheckpointError, or OSError when the directory cannot be read.
    """
    _check_regular(directory, stat.S_ISDIR, "a directory")
    path = directory / MANIFEST_FILE
    if not os.path.lexists(path):
        raise CheckpointError("missing", field=str(path), allowed="a manifest")
    size = _check_regular(path, stat.S_ISREG, "a regular file").st_size
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError("too large", field=str(path), value=size, allowed=f"{MAX_MANIFEST_BYTES} bytes")
    manifest = parse_manifest(path.read_bytes(), str(path))
    files = manifest.contents.files
    if TRAINER_FILE not in files:
        raise CheckpointError(f"{TRAINER_FILE} is not listed", field=str(path))
    present, listed = set(os.listdir(directory)), {*files, MANIFEST_FILE}
    if present != listed:
        missing, extra = sorted(listed - present)[:5], sorted(present - listed)[:5]
        raise CheckpointError("the directory does not match its manifest", field=str(directory),
                              value=f"missing {missing}, unlisted {extra}", allowed="the listed files")  # fmt: skip
    if layout.step_of(directory.name) not in (manifest.step, None):
        raise CheckpointError("its step differs from its directory's name", field=str(path), value=manifest.step)
    for name, entry in files.items():
        size = _check_regular(directory / name, stat.S_ISREG, "a regular file").st_size
        if size != entry.size:
            raise CheckpointError("wrong size", field=str(directory / name), value=size, allowed=f"{entry.size} bytes")
    return manifest


def _verify_together(directory: Path, world: World, fix: str | None = None) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or None and the reason; the same on every rank."""
    damage: CheckpointError | None = None
    checkpoint = None
    with world.agreed(f"read {directory}", fix=fix):
        try:
            checkpoint = Checkpoint(directory, verify(directory, world))
            assert checkpoint.trainer_state is not None, "read here, so that all ranks learn of a fault"
        except FormatError:
            raise
        except CheckpointError as error:
            damage = error
    try:
        world.raise_together(damage)
    except KhaError as error:
        return None, str(error)
    return checkpoint, ""


def _set_aside(directory: Path, step: int) -> str:
    try:
        return f"It is kept as {layout.set_aside(directory, step).name}"
    except OSError as error:
        return f"It stays in place ({error.strerror})"


def _check_regular(path: Path, is_right: Callable[[int], bool], expected: str) -> os.stat_result:
    """`lstat` of the path, which must be of the expected type and no symbolic link. Raises CheckpointError, OSError."""
    found = os.lstat(path)
    if not is_right(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else f"mode {found.st_mode:o}"
        raise CheckpointError("not a regular part of a checkpoint", field=str(path), value=kind, allowed=expected)
    return found


def _check_hash(path: Path, expected: FileEntry, alive: Callable[[], None]) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            alive()
    if digest.hexdigest() != expected.sha256:
        raise CheckpointError("its content has changed", field=str(path), value=f"SHA-256 {digest.hexdigest()[:16]}...",
                              allowed=f"SHA-256 {expected.sha256[:16]}...")  # fmt: skip


def _read_slice(path: Path, key: str, dtype: str, shape: tuple[int, ...], wanted: slice | None) -> Tensor:
    """Tensor `key`, or a slice of a 1-D tensor, after checking dtype and shape. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice(key)
            if stored.get_dtype() != dtype or tuple(stored.get_shape()) != shape:
                found = f"{stored.get_dtype()} {stored.get_shape()}"
                raise CheckpointError(f"tensor {key!r}", field=str(path), value=found, allowed=f"{dtype} {list(shape)}")
            tensor: Tensor = stored[wanted] if wanted is not None else file.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"tensor {key!r} cannot be read: {error}", field=str(path)) from error
