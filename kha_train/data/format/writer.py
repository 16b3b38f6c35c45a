"""Writes datasets of format version 1: shards in any order and by any process, then the manifest.

A shard is a pure function of its documents, so any number of processes writes the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from kha_train.data.format import manifest as manifests
from kha_train.data.format.canonical import sha256_of_file
from kha_train.data.format.manifest import (
    CRC_BLOCK_BYTES,
    ENDS_PER_BLOCK,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ShardEntry,
    TokenizerEntry,
)
from kha_train.errors import DataError
from kha_train.record.provenance import with_version

PART = ".part"
"""Suffix of a file that is still being written."""


class _HashedFile:
    """A file being written whose size and SHA-256 are known at the end. It then gets its final name, with its bytes
    safely on disk. Two processes that write the same file do not interfere.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._beside = path, path.with_name(f"{path.name}.{os.getpid()}{PART}")
        self._file, self._digest, self._bytes = self._beside.open("wb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def finish(self) -> FileEntry:
        """The file's entry in the manifest."""
        _sync(self._file)
        self._file.close()
        os.replace(self._beside, self._path)
        return FileEntry(self._path.name, self._bytes, self._digest.hexdigest())

    def drop(self) -> None:
        """Remove the file unless it is finished."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


class BlockChecksums:
    """CRC-32 of each 64 KiB block of the bytes fed to it, the last block shorter."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._pending = bytearray()

    def feed(self, data: bytes) -> None:
        """Add the next bytes of the file."""
        self._pending += data
        whole = len(self._pending) // CRC_BLOCK_BYTES * CRC_BLOCK_BYTES
        for start in range(0, whole, CRC_BLOCK_BYTES):
            self._done.append(zlib.crc32(self._pending[start : start + CRC_BLOCK_BYTES]))
        del self._pending[:whole]

    def finish(self) -> bytes:
        """The checksums, as `.crc` stores them."""
        last = [zlib.crc32(self._pending)] if self._pending else []
        return np.asarray(self._done + last, dtype="<u4").tobytes()


def checksum_file(tok_checksums: bytes, ends: np.ndarray) -> bytes:
    """The content of `.crc`: CRC-32 of the blocks of `.tok`, then of `.doc`, then the last end of each block of `.doc`.

    `ends` are the document ends of the shard, int64.
    """
    doc_checksums = BlockChecksums()
    doc_checksums.feed(ends.astype("<i8").tobytes())
    last_ends = ends[ENDS_PER_BLOCK - 1 :: ENDS_PER_BLOCK]
    if len(ends) % ENDS_PER_BLOCK:
        last_ends = np.append(last_ends, ends[-1])
    return tok_checksums + doc_checksums.finish() + last_ends.astype("<i8").tobytes()


def prepare(directory: Path, *, keep: Collection[int] = ()) -> None:
    """Prepare `directory` for shards: create it, and unpublish the dataset in it.

    Existing shards are removed, except those with a number in `keep`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    kept = {f"shard-{index:05d}" for index in keep}
    for stale in [path for suffix in ("tok", "doc", "crc", "done") for path in directory.glob(f"shard-*.{suffix}")]:
        if stale.stem not in kept:
            stale.unlink()
    for stale in directory.glob(f"*{PART}"):
        stale.unlink()


def mark_finished(directory: Path, index: int, entry: ShardEntry | None, identity: str) -> None:
    """Write a note beside a finished shard, so that an interrupted encoding with the same `identity` can continue."""
    path = directory / f"shard-{index:05d}.done"
    temporary = path.with_suffix(f".{os.getpid()}")
    note = {"identity": identity, "shard": None if entry is None else asdict(entry)}
    temporary.write_text(json.dumps(note), encoding="ascii")
    os.replace(temporary, path)


def finished_shards(directory: Path, identities: Mapping[int, str]) -> dict[int, ShardEntry | None]:
    """The intact shards of an interrupted encoding, by number: those whose note has the identity for their number."""
    finished: dict[int, ShardEntry | None] = {}
    for path in directory.glob("shard-*.done"):
        try:
            note = json.loads(path.read_bytes())
        except ValueError:
            continue
        index = int(path.stem.removeprefix("shard-"))
        if not isinstance(note, dict) or note.get("identity") != identities.get(index):
            continue
        entry = None if note["shard"] is None else manifests.shard_entry(note["shard"])
        files = (entry.tok, entry.doc, entry.crc) if entry else ()
        if all(
            (directory / file.file).is_file() and sha256_of_file(directory / file.file) == file.sha256 for file in files
        ):
            finished[index] = entry
    return finished


class ShardWriter:
    """Shard number `index` of `directory`, written document by document. Empty documents are left out, so that document
    borders are unique.
    """

    def __init__(self, directory: Path, index: int, *, vocab_size: int, dtype: str) -> None:
        self._path = directory / f"shard-{index:05d}.tok"
        self._vocab_size, self._dtype = vocab_size, np.dtype(dtype).newbyteorder("<")
        self._tok, self._checksums = _HashedFile(self._path), BlockChecksums()
        self._ends: list[int] = []
        self._tokens, self._text_bytes, self._min_id, self._max_id = 0, 0, vocab_size, -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tok.drop()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document and the number of UTF-8 bytes of its text. Raises DataError for an id outside the
        vocabulary.
        """
        if len(ids) == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            problem = f"an id outside the vocabulary of {self._vocab_size}"
            raise DataError(problem, field=str(self._path), value=(low, high))
        self._min_id, self._max_id = min(self._min_id, low), max(self._max_id, high)
        self._tokens, self._text_bytes = self._tokens + len(ids), self._text_bytes + text_bytes
        self._ends.append(self._tokens)
        data = ids.astype(self._dtype).tobytes()
        self._tok.write(data)
        self._checksums.feed(data)

    def finish(self) -> ShardEntry | None:
        """The shard's entry in the manifest; None, and no file, when no document had any id."""
        if not self._ends:
            return None
        tok = self._tok.finish()
        ends = np.asarray(self._ends, dtype="<i8")
        doc = write_file(self._path.with_suffix(".doc"), ends.tobytes())
        crc = write_file(self._path.with_suffix(".crc"), checksum_file(self._checksums.finish(), ends))
        return ShardEntry(
            self._tokens, len(ends), self._text_bytes, self._min_id, self._max_id, tok=tok, doc=doc, crc=crc
        )


def write_shard(
    directory: Path, index: int, documents: Iterable[tuple[np.ndarray, int]], *, vocab_size: int, dtype: str
) -> ShardEntry | None:
    """Write shard number `index` from documents, each (ids, UTF-8 bytes of its text); returns and raises as
    `ShardWriter`.
    """
    with ShardWriter(directory, index, vocab_size=vocab_size, dtype=dtype) as writer:
        for ids, text_bytes in documents:
            writer.add(ids, text_bytes)
        return writer.finish()


def publish_dataset(
    directory: Path,
    shards: Sequence[ShardEntry | None],
    tokenizer: TokenizerEntry,
    *,
    dtype: str,
    corpus: dict[str, Any],
    tokenizer_file: Path | None = None,
    encoder: str = "",
) -> Manifest:
    """Copy the tokenizer beside finished shards, then write the manifest: only now is the directory a dataset.

    `encoder`, the program that made the ids, is recorded beside the tool; neither is part of the content id. Raises
    DataError when nothing was written or the entries do not make a valid manifest.
    """
    written = [shard for shard in shards if shard is not None]
    if not written:
        raise DataError("no document holds any token", field=str(directory))
    if tokenizer_file is not None:
        assert tokenizer.file is not None
        with open(tokenizer_file, "rb") as source, open(directory / tokenizer.file, "wb") as target:
            shutil.copyfileobj(source, target)
            _sync(target)
    tool = ", ".join([with_version("kha_train"), *([encoder] if encoder else [])])
    raw = manifests.build(written, tokenizer, dtype=dtype, corpus=corpus, tool=tool)
    manifest = manifests.publish(directory, raw)
    for note in directory.glob("shard-*.done"):
        note.unlink()
    return manifest


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write a small file; on return its bytes are safely on disk."""
    file = _HashedFile(path)
    file.write(data)
    return file.finish()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
