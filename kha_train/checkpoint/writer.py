"""Writes a checkpoint: every rank writes its own pieces, then rank 0 writes the manifest, then renames the directory.

    1. rank 0 removes the leftovers of dead saves and creates `.step-N.saving-XXXX`
    2. every rank writes its safetensors and `rank-RRRRR.json`, which lists them
    3. rank 0 merges the lists, checks that they cover every parameter, writes trainer.json and finally the manifest
    4. rank 0 renames the directory to `step-N`

All ranks finish each stage together, with one error or none (`background.py`). The previous checkpoint is untouched
until the rename. A kill leaves only a hidden directory, which the next save removes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kha_train.checkpoint import layout
from kha_train.checkpoint.manifest import (
    KINDS,
    MANIFEST_FILE,
    TRAINER_FILE,
    UNNAMED,
    BufferEntry,
    Contents,
    FileEntry,
    Kinds,
    Manifest,
    ParameterEntry,
    PieceEntry,
    parse_contents,
    parse_manifest,
)
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.tensor_file import DTYPE_NAMES, write_bytes, write_tensors
from kha_train.checkpoint.trainer_state import encode_state
from kha_train.distributed import World
from kha_train.errors import CheckpointError
from kha_train.record.files import sync_directory
from kha_train.record.provenance import with_version

PART_BYTES = 512 * 2**20
Stage = Literal["first_shard", "mid_shard", "before_manifest", "before_rename", "between_renames", "after_rename"]
"""The stages of a save, in order."""


def no_stage(name: str) -> None:
    """The `stage` callable outside tests: does nothing."""


def encode_on_main(world: World, trainer_state: dict[str, Any]) -> bytes:
    """Rank 0's `trainer_state` as the bytes of trainer.json (empty elsewhere). Collective; raises CheckpointError."""
    encoded = b""
    with world.agreed("describe the checkpoint", CheckpointError):
        if world.is_main:
            encoded = encode_state(trainer_state)
    return encoded


class Save:
    """One rank's part in writing one checkpoint. Its methods are local; all ranks must agree between them.

    `prepare`, `write_share`, `publish` and `clear` hold no collectives, so that they can run in a thread beside
    training. The caller makes sure that no rank begins a stage before all ranks have finished the last
    (`background.BackgroundWriter`). The constructor is collective: the ranks agree on a random name. `moves` counts
    what has been done so far, in no unit: a rising count means progress.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        world: World,
        trainer_state: bytes,
        *,
        kinds: Kinds = UNNAMED,
        stage: Callable[[Stage], None] = no_stage,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.step, self.moves = step, 0
        self._world, self._trainer_state, self._part_bytes = world, trainer_state, part_bytes
        self._kinds, self._told_stage = kinds, stage
        self._folder = Path(run_dir) / layout.FOLDER
        self._temporary = self._folder / world.broadcast_text(layout.temporary_name(step, "saving"))

    @property
    def path(self) -> Path:
        """The path of the checkpoint once it is published."""
        return self._folder / layout.step_name(self.step)

    def prepare(self) -> None:
        """Rank 0 removes the leftovers of dead saves and creates the hidden directory. Raises OSError."""
        if self._world.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            layout.clear_leftovers(self._folder, "saving", "deleting")
            self._temporary.mkdir()

    def write_share(self, pieces: Iterable[Piece], buffers: dict[str, Tensor]) -> None:
        """Write this rank's files. Raises OSError, and CheckpointError for pieces that contradict each other."""
        rank = self._world.rank
        share = _Share(self._temporary, rank, self._kinds, self._stage, self._moved, self._part_bytes)
        share.write(pieces, buffers if rank == 0 else {})
        if rank == 0:
            share.files[TRAINER_FILE] = write_bytes(self._temporary / TRAINER_FILE, self._trainer_state)
        write_bytes(self._temporary / _rank_file(rank), json.dumps(share.contents().to_plain()).encode())

    def publish(self) -> None:
        """Rank 0 merges the shares, writes the manifest and renames the directory. Raises OSError, CheckpointError."""
        if self._world.is_main:
            _write_manifest(self._temporary, self.step, self._world.size, self._stage)
            publish(self._temporary, self.path, self.step, self._stage)

    def clear(self) -> None:
        """Rank 0 removes the files of a failed save; after a successful one there are none."""
        if self._world.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _moved(self) -> None:
        self.moves += 1

    def _stage(self, name: Stage) -> None:
        self._moved()
        self._told_stage(name)


class _Share:
    """The files of one rank: `model-RRRRR.safetensors` and `optimizer-RRRRR.safetensors`, and further parts of each."""

    def __init__(
        self,
        directory: Path,
        rank: int,
        kinds: Kinds,
        stage: Callable[[Stage], None],
        wrote: Callable[[], None],
        part_bytes: int,
    ) -> None:
        self.files: dict[str, FileEntry] = {}
        self._directory, self._rank, self._stage, self._part_bytes = directory, rank, stage, part_bytes
        self._wrote, self._kinds = wrote, kinds
        self._waiting: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        self._waiting_bytes = {"model": 0, "optimizer": 0}
        self._parts = {"model": 0, "optimizer": 0}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[PieceEntry]] = {}
        self._buffers: dict[str, BufferEntry] = {}

    def write(self, pieces: Iterable[Piece], buffers: dict[str, Tensor]) -> None:
        """Write everything. Raises OSError, or CheckpointError for pieces that contradict each other."""
        for name, buffer in buffers.items():
            file = self._add("model", f"buffer:{name}", buffer)
            self._buffers[name] = BufferEntry(file, f"buffer:{name}", DTYPE_NAMES[buffer.dtype], tuple(buffer.shape))
        for piece in pieces:
            assert piece.kind in self._kinds.names, piece.kind
            if self._shapes.setdefault(piece.name, tuple(piece.shape)) != tuple(piece.shape):
                _two_shapes(piece.name, self._shapes[piece.name], piece.shape)
            if len(piece.values):
                key = f"{piece.kind}:{piece.name}:{piece.start}"
                file = self._add("model" if piece.kind == "master" else "optimizer", key, piece.values)
                entry = PieceEntry(file, key, piece.start, len(piece.values))
                self._pieces.setdefault((piece.name, piece.kind), []).append(entry)
        for family in self._waiting:
            self._flush(family)

    def contents(self) -> Contents:
        """What was written, as one share of the manifest."""
        parameters = {
            name: ParameterEntry(shape, _by_kind(self._pieces, name, self._kinds))
            for name, shape in self._shapes.items()
        }
        return Contents(self.files, parameters, self._buffers, self._kinds)

    def _add(self, family: str, key: str, tensor: Tensor) -> str:
        """Queue a tensor and return the file it will be written to."""
        waiting = self._waiting[family]
        if key in waiting:
            raise CheckpointError("given twice", field="pieces", value=key, allowed="each piece once")
        if waiting and self._waiting_bytes[family] + tensor.nbytes > self._part_bytes:
            self._flush(family)
        self._waiting[family][key] = tensor
        self._waiting_bytes[family] += tensor.nbytes
        return self._file_name(family)

    def _flush(self, family: str) -> None:
        if not self._waiting[family]:
            return
        if not self.files:
            self._stage("first_shard")
        name = self._file_name(family)
        path = self._directory / name
        tensors = self._waiting[family]
        self.files[name] = write_tensors(path, tensors, lambda: self._stage("mid_shard"), self._wrote)
        self._waiting[family], self._waiting_bytes[family] = {}, 0
        self._parts[family] += 1

    def _file_name(self, family: str) -> str:
        part = f".{self._parts[family]:03d}" if self._parts[family] else ""
        return f"{family}-{self._rank:05d}{part}.safetensors"


def _write_manifest(directory: Path, step: int, world_size: int, stage: Callable[[Stage], None]) -> None:
    """Merge what the ranks wrote and write the manifest last. Raises CheckpointError when it is inconsistent."""
    shares = []
    for rank in range(world_size):
        path = directory / _rank_file(rank)
        shares.append(parse_contents(json.loads(path.read_bytes()), path.name))
        path.unlink()
    contents = _join(shares)
    stage("before_manifest")
    encoded = Manifest(step, with_version("kha_train"), contents).encode()
    parse_manifest(encoded, "the pieces of all ranks")
    write_bytes(directory / MANIFEST_FILE, encoded)
    sync_directory(directory)


def _join(shares: list[Contents]) -> Contents:
    files: dict[str, FileEntry] = {}
    buffers: dict[str, BufferEntry] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[tuple[str, str], list[PieceEntry]] = {}
    kinds = shares[0].kinds
    for share in shares:
        assert share.kinds == kinds, "ranks of one run have one optimiser"
        files |= share.files
        buffers |= share.buffers
        for name, parameter in share.parameters.items():
            if shapes.setdefault(name, parameter.shape) != parameter.shape:
                _two_shapes(name, shapes[name], parameter.shape)
            for kind, held in parameter.pieces.items():
                pieces.setdefault((name, kind), []).extend(held)
    for entries in pieces.values():
        entries.sort(key=lambda piece: piece.start)
    parameters = {name: ParameterEntry(shape, _by_kind(pieces, name, kinds)) for name, shape in shapes.items()}
    return Contents(files, parameters, buffers, kinds)


def _by_kind(
    pieces: Mapping[tuple[str, str], Sequence[PieceEntry]], name: str, kinds: Kinds
) -> dict[str, tuple[PieceEntry, ...]]:
    """The pieces of the parameter `name` in each of the `kinds`, or in those that it has."""
    found = {kind: tuple(pieces.get((name, kind), ())) for kind in kinds.names}
    return {kind: held for kind, held in found.items() if held or not kinds.of_some or kind == KINDS[0]}


def publish(temporary: Path, final: Path, step: int, stage: Callable[[Stage], None] = no_stage) -> None:
    """Rename the finished directory to its final name. A checkpoint already there stays readable until the new one is
    in place.
    """
    replaced = None
    stage("before_rename")
    if os.path.lexists(final):
        replaced = final.with_name(layout.temporary_name(step, "replaced"))
        os.rename(final, replaced)
        stage("between_renames")
    os.rename(temporary, final)
    sync_directory(final.parent)
    stage("after_rename")
    if replaced is not None:
        layout.remove(replaced, step)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _two_shapes(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    raise CheckpointError(f"two shapes of {name}", field="pieces", value=list(second), allowed=f"{list(first)}")
