"""Reading datasets of format version 1, and noticing when they are not what their manifest says.

At open, cheap: the manifest and the size of every file. At the first touch of a shard: SHA-256 of its document ends and
of its checksums. At the first touch of a 64 KiB block of tokens: its CRC-32; one bit a block remembers. At every read:
the length, and the largest id. A fault is a DataError that names shard, offset, expected and found.

Tokens are read by `pread`, not through a memory map: a file truncated under a map kills the process by SIGBUS, whereas
a short read can be told.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kha_train.data import manifest as manifests
from kha_train.data.canonical import sha256_of_file
from kha_train.data.manifest import CRC_BLOCK_BYTES, DTYPE_BYTES, FileEntry, Manifest, ShardEntry
from kha_train.errors import ConfigError, DataError

_OPEN_FILES = 128
_CHUNK_BYTES = 1 << 20
_ENDS_BLOCK = 512


class _Files:
    """Exact reads from many files with few descriptors open: the least recently used one is closed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes of a file from `offset` on. Raises DataError when they are not there."""
        try:
            data = os.pread(self._descriptor(name), count, offset)
        except OSError as error:
            raise DataError(f"offset {offset}: cannot be read: {error.strerror}", field=self.path(name)) from error
        if len(data) != count:
            raise DataError(
                f"offset {offset}: expected {count} bytes, found {len(data)}: the file was truncated",
                field=self.path(name),
                fix="restore the file, or write the dataset again",
            )
        return data

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open[name] = descriptor
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class _Shard:
    """One shard that has been touched: which of its blocks are checked, and a coarse index of its document ends."""

    def __init__(self, entry: ShardEntry, files: _Files, dtype: np.dtype, check_crc: bool) -> None:
        self._entry, self._files, self._dtype, self._check_crc = entry, files, dtype, check_crc
        self._checked = bytearray(-(-entry.crc.bytes // 32))
        self._last_end_of_block = self._index_ends()
        self._check_digest(entry.crc)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count), checked."""
        assert 0 <= start and count >= 0 and start + count <= self._entry.tokens, (start, count)
        first, last = start * self._dtype.itemsize, (start + count) * self._dtype.itemsize
        block, beyond = first // CRC_BLOCK_BYTES, -(-last // CRC_BLOCK_BYTES)
        if self._check_crc and any(not self._is_checked(b) for b in range(block, beyond)):
            origin = block * CRC_BLOCK_BYTES
            end = min(beyond * CRC_BLOCK_BYTES, self._entry.tok.bytes)
            data = self._files.read(self._entry.tok.file, origin, end - origin)
            self._check_blocks(block, beyond, data)
            data = data[first - origin : last - origin]
        else:
            data = self._files.read(self._entry.tok.file, first, last - first)
        ids = np.frombuffer(data, dtype=self._dtype)
        if count and int(ids.max()) > self._entry.max_id:
            where = int(ids.argmax())
            raise DataError(
                f"token {start + where}: expected an id of at most {self._entry.max_id}, found {int(ids[where])}",
                field=self._files.path(self._entry.tok.file),
                fix="restore the file, or write the dataset again",
            )
        return ids

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """The exclusive document ends e with start < e <= stop, int64, ascending."""
        low = int(np.searchsorted(self._last_end_of_block, start, side="right")) * _ENDS_BLOCK
        high = (int(np.searchsorted(self._last_end_of_block, stop, side="left")) + 1) * _ENDS_BLOCK
        high = min(high, self._entry.documents)
        if low >= high:
            return np.empty(0, dtype=np.int64)
        ends = np.frombuffer(self._files.read(self._entry.doc.file, low * 8, (high - low) * 8), dtype="<i8")
        self._check_ascending(ends, low)
        return ends[(ends > start) & (ends <= stop)].astype(np.int64)

    def _is_checked(self, block: int) -> bool:
        return bool(self._checked[block >> 3] & (1 << (block & 7)))

    def _check_blocks(self, first: int, beyond: int, data: bytes) -> None:
        expected = np.frombuffer(self._files.read(self._entry.crc.file, first * 4, (beyond - first) * 4), dtype="<u4")
        view = memoryview(data)
        for i, block in enumerate(range(first, beyond)):
            found = zlib.crc32(view[i * CRC_BLOCK_BYTES : (i + 1) * CRC_BLOCK_BYTES])
            if found != int(expected[i]):
                raise DataError(
                    f"offset {block * CRC_BLOCK_BYTES}: expected CRC-32 {int(expected[i]):08x}, found {found:08x}:"
                    " the tokens of this block were changed",
                    field=self._files.path(self._entry.tok.file),
                    fix="restore the file, or write the dataset again",
                )
            self._checked[block >> 3] |= 1 << (block & 7)

    def _index_ends(self) -> np.ndarray:
        """Check the document ends against the manifest and keep every 512th: 8 bytes for 4 KiB of the file."""
        digest, kept, previous = hashlib.sha256(), [], 0
        for offset, data in self._chunks(self._entry.doc):
            digest.update(data)
            ends = np.frombuffer(data, dtype="<i8")
            kept.append(ends[_ENDS_BLOCK - 1 :: _ENDS_BLOCK].astype(np.int64))
            self._check_ascending(np.concatenate(([previous], ends)), offset // 8 - 1)
            previous = int(ends[-1])
        self._compare(self._entry.doc, digest.hexdigest())
        if previous != self._entry.tokens:
            raise DataError(
                f"the last document ends at token {previous}, the manifest has {self._entry.tokens} tokens",
                field=self._files.path(self._entry.doc.file),
            )
        return np.concatenate([*kept, [previous]] if self._entry.documents % _ENDS_BLOCK else kept)

    def _check_ascending(self, ends: np.ndarray, first: int) -> None:
        falls = np.flatnonzero(ends[1:] <= ends[:-1])
        if falls.size:
            where = int(falls[0])
            raise DataError(
                f"document {first + where + 1}: expected an end above {int(ends[where])}, found {int(ends[where + 1])}",
                field=self._files.path(self._entry.doc.file),
                fix="restore the file, or write the dataset again",
            )

    def _chunks(self, entry: FileEntry) -> Iterator[tuple[int, bytes]]:
        for offset in range(0, entry.bytes, _CHUNK_BYTES):
            yield offset, self._files.read(entry.file, offset, min(_CHUNK_BYTES, entry.bytes - offset))

    def _check_digest(self, entry: FileEntry) -> None:
        digest = hashlib.sha256()
        for _, data in self._chunks(entry):
            digest.update(data)
        self._compare(entry, digest.hexdigest())

    def _compare(self, entry: FileEntry, found: str) -> None:
        if found != entry.sha256:
            raise DataError(
                f"expected SHA-256 {entry.sha256}, found {found}",
                field=self._files.path(entry.file),
                fix="restore the file, or write the dataset again",
            )

    def verify(self) -> tuple[np.ndarray, int]:
        """Read every byte: SHA-256 and checksums of the tokens; returns the count of each id and the smallest id."""
        digest, counts, least = hashlib.sha256(), np.zeros(self._entry.max_id + 1, dtype=np.int64), self._entry.max_id
        self._checked = bytearray(len(self._checked))
        for offset, data in self._chunks(self._entry.tok):
            digest.update(data)
            ids = self.read(offset // self._dtype.itemsize, len(data) // self._dtype.itemsize)
            counts += np.bincount(ids, minlength=len(counts))
            least = min(least, int(ids.min()))
        self._compare(self._entry.tok, digest.hexdigest())
        return counts, least


class ShardSet:
    """A dataset directory opened for reading. Ids come as little-endian uint16 or uint32 arrays.

    `manifest` is the checked manifest, `directory` where it lies.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, check_crc: bool, field: str) -> None:
        self.directory, self.manifest, self._check_crc, self._field = directory, manifest, check_crc, field
        self._files = _Files(directory)
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        assert self._dtype.itemsize == DTYPE_BYTES[manifest.dtype]
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def open(cls, directory: str | Path, *, check_crc: bool = True, field: str = "dataset") -> ShardSet:
        """Open a dataset; `field` is the configuration key that named it, for error messages.

        Raises ConfigError when there is no dataset there, DataError when the manifest or a file's size is wrong.
        """
        directory = Path(directory)
        manifest = manifests.load(directory, field=field)
        for entry in (file for shard in manifest.shards for file in (shard.tok, shard.doc, shard.crc)):
            _check_size(directory / entry.file, entry.bytes)
        return cls(directory, manifest, check_crc=check_crc, field=field)

    @property
    def content_id(self) -> str:
        """The name of the data itself (SHA-256 in hexadecimal)."""
        return self.manifest.content_id

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer that made the dataset."""
        return self.manifest.tokenizer.vocab

    @property
    def bytes_per_id(self) -> np.ndarray:
        """int64 [V]: the bytes of text each id stands for; 0 for control ids."""
        return np.asarray(self.manifest.tokenizer.bytes_per_id, dtype=np.int64)

    def read(self, shard: int, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count) of a shard, read-only. Raises DataError when they are damaged."""
        return self._shard(shard).read(start, count)

    def document_ends(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The exclusive document ends e of a shard with start < e <= stop, int64. Raises DataError when damaged."""
        return self._shard(shard).document_ends(start, stop)

    def check_tokenizer(self) -> Path | None:
        """The tokenizer file beside the manifest, or None when the dataset needs none (synthetic ids).

        Raises ConfigError when it is missing or is not the one that made the ids.
        """
        entry = self.manifest.tokenizer
        if entry.file is None:
            return None
        path = self.directory / entry.file
        fix = "put back the file that made the dataset, or tokenize again"
        if not path.is_file():
            raise ConfigError("the tokenizer file is missing", field=self._field, value=str(path), fix=fix)
        found = sha256_of_file(path)
        if found != entry.sha256:
            raise ConfigError(
                f"not the tokenizer that made this dataset: its SHA-256 is {found}, the manifest has {entry.sha256}",
                field=self._field,
                value=str(path),
                fix=fix,
            )
        return path

    def token_counts(self, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """int64 [V]: how often each id occurs. Reads and checks everything; `progress` gets token counts.

        Raises DataError for any fault, the totals of the manifest included.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for index, entry in enumerate(self.manifest.shards):
            found, least = self._shard(index).verify()
            text_bytes = int(found @ self.bytes_per_id[: len(found)])
            largest = int(np.flatnonzero(found)[-1])
            expected = (entry.min_id, entry.max_id, entry.text_bytes)
            if (least, largest, text_bytes) != expected:
                raise DataError(
                    f"expected (min id, max id, text bytes) {expected}, found {(least, largest, text_bytes)}",
                    field=self._files.path(entry.tok.file),
                )
            counts[: len(found)] += found
            if progress is not None:
                progress(entry.tokens)
        return counts

    def _shard(self, index: int) -> _Shard:
        if index not in self._shards:
            entry = self.manifest.shards[index]
            self._shards[index] = _Shard(entry, self._files, self._dtype, self._check_crc)
        return self._shards[index]


def _check_size(path: Path, expected: int) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", field=str(path), fix="restore the file") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
        raise DataError(
            f"offset {min(status.st_size, expected)}: expected {expected} bytes, found {status.st_size}",
            field=str(path),
            fix="restore the file, or write the dataset again",
        )
