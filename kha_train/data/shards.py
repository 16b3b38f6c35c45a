"""Reading datasets of format version 1, and noticing when they are not what their manifest says.

At open, cheap: the manifest and the size of every file. At the first need of a shard's checksums or document ends: the
SHA-256 of its checksums. At the first touch of a 64 KiB block of either: its CRC-32; one bit a block of tokens
remembers. At every read: the length, and the largest id. A fault is a DataError that names shard, offset, expected and
found.
"""

# N rows  L tokens of a row

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from kha_train.data import manifest as manifests
from kha_train.data.canonical import sha256_of_file
from kha_train.data.files import READERS, RESTORE, Files
from kha_train.data.manifest import CRC_BLOCK_BYTES, DTYPE_BYTES, ENDS_PER_BLOCK, FileEntry, Manifest, ShardEntry
from kha_train.errors import DataError

CACHE, CACHE_GIB = "~/.cache/kha_train/data", 100.0
_BLOCK_SHIFT = CRC_BLOCK_BYTES.bit_length() - 1
_CHUNK_BYTES = 1 << 20
_CACHED_ENDS_BLOCKS = 64


class _Shard:
    """One shard that has been touched: its checksums, which of its blocks are checked, where its documents end."""

    def __init__(self, index: int, entry: ShardEntry, files: Files, dtype: np.dtype, check_crc: bool) -> None:
        self.entry, self._index, self._files, self._check_crc = entry, index, files, check_crc
        self._tok, self._offset, self._width, self._dtype = entry.tok.file, entry.tok_offset, dtype.itemsize, dtype
        self._blocks = -(-entry.tok.bytes // CRC_BLOCK_BYTES)
        self._checked = bytearray(-(-self._blocks // 8) if check_crc else 0)

    @cached_property
    def _checksums(self) -> tuple[str, np.ndarray]:
        """The file of checksums, found to be what the manifest says, and the last document end of each block of ends.

        The checksums themselves stay in their file: terabytes of tokens have hundreds of megabytes of them.
        """
        crc, ends_blocks = self.entry.crc, -(-self.entry.documents // ENDS_PER_BLOCK)
        data = self._files.read(crc.file, 0, crc.bytes)
        self._compare(crc, hashlib.sha256(data).hexdigest())
        last_ends = np.frombuffer(data, dtype="<i8", offset=4 * (self._blocks + ends_blocks)).astype(np.int64)
        if int(last_ends[-1]) != self.entry.tokens:
            raise DataError(
                f"the last document ends at token {last_ends[-1]}, the manifest has {self.entry.tokens} tokens",
                field=self._files.path(crc.file),
            )
        return crc.file, last_ends

    @property
    def _last_ends(self) -> np.ndarray:
        return self._checksums[1]

    def check_blocks(self, start: int, count: int) -> None:
        """Compare the blocks of ids [start, start + count) that nobody has compared yet with their checksums."""
        first, last = start * self._width, (start + count) * self._width - 1
        for block in range(first >> _BLOCK_SHIFT, (last >> _BLOCK_SHIFT) + 1):
            if not self._checked[block >> 3] >> (block & 7) & 1:
                self._check_block(block)

    def place(self, start: int) -> tuple[str, int]:
        """File and offset of the ids from token `start` on."""
        return self._tok, self._offset + start * self._width

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count), checked."""
        assert 0 <= start and count >= 0 and start + count <= self.entry.tokens, (start, count)
        ids = np.empty(count, dtype=self._dtype)
        if count:
            if self._check_crc:
                self.check_blocks(start, count)
            self._files.read_into(*self.place(start), memoryview(ids).cast("B"))
            self.check_largest(start, ids)
        ids.flags.writeable = False
        return ids

    def check_largest(self, start: int, ids: np.ndarray) -> None:
        """Raises DataError when an id is above the largest of the shard."""
        where = int(ids.argmax())
        if int(ids[where]) > self.entry.max_id:
            raise DataError(
                f"token {start + where}: expected an id of at most {self.entry.max_id}, found {int(ids[where])}",
                field=self._files.path(self._tok),
                fix=RESTORE,
            )

    def ends_in_rows(self, starts_N: np.ndarray, length: int, ends_of: _EndsCache) -> tuple[np.ndarray, np.ndarray]:
        """The document ends e with start < e <= start + length of rows anywhere: (number of the row, e - start)."""
        blocks_N = np.searchsorted(self._last_ends, starts_N, side="right")
        numbers, ends = [], []
        for block in np.unique(blocks_N).tolist():
            inside = np.flatnonzero(blocks_N == block)
            starts = starts_N[inside]
            window = self._window(block, int(starts.max()) + length, ends_of)
            low = np.searchsorted(window, starts, side="right")
            counts = np.searchsorted(window, starts + length, side="right") - low
            before = np.cumsum(counts) - counts
            picked = np.arange(int(counts.sum())) + np.repeat(low - before, counts)
            ends.append(window[picked] - np.repeat(starts, counts))
            numbers.append(np.repeat(inside, counts))
        return np.concatenate(numbers), np.concatenate(ends)

    def ends_place(self, start: int) -> tuple[str, int, int]:
        """File, offset and bytes of the document ends that begin with the first one after token `start`."""
        return self._ends_block(int(self._last_ends.searchsorted(start, side="right")))

    def _ends_block(self, block: int) -> tuple[str, int, int]:
        first = block * CRC_BLOCK_BYTES
        return self.entry.doc.file, first, min(CRC_BLOCK_BYTES, self.entry.doc.bytes - first)

    def read_ends(self, block: int, *, check_crc: bool) -> np.ndarray:
        """The document ends of one 64 KiB block of `.doc`, int64, checked."""
        _, first, _ = place = self._ends_block(block)
        data = self._files.read(*place)
        if check_crc:
            self._compare_crc(self.entry.doc, first, zlib.crc32(data), self._blocks + block)
        ends = np.frombuffer(data, dtype="<i8").astype(np.int64)
        previous = int(self._last_ends[block - 1]) if block else 0
        falls = np.flatnonzero(np.diff(ends, prepend=previous) <= 0)
        if falls.size or int(ends[-1]) != int(self._last_ends[block]):
            where = int(falls[0]) if falls.size else len(ends) - 1
            raise DataError(
                f"document {block * ENDS_PER_BLOCK + where}: ends at token {int(ends[where])}, out of order",
                field=self._files.path(self.entry.doc.file),
                fix=RESTORE,
            )
        return ends

    def verify(self) -> tuple[np.ndarray, int]:
        """Read every byte: digests, checksums and document ends; returns the count of each id and the smallest id."""
        counts, least = np.zeros(self.entry.max_id + 1, dtype=np.int64), self.entry.max_id
        self._checked = bytearray(len(self._checked))
        digest = hashlib.sha256()
        step = _CHUNK_BYTES // self._width
        for start in range(0, self.entry.tokens, step):
            ids = self.read(start, min(step, self.entry.tokens - start))
            digest.update(ids.tobytes())
            counts += np.bincount(ids, minlength=len(counts))
            least = min(least, int(ids.min()))
        self._compare(self.entry.tok, digest.hexdigest())
        digest = hashlib.sha256()
        for block in range(len(self._last_ends)):
            digest.update(self.read_ends(block, check_crc=True).astype("<i8").tobytes())
        self._compare(self.entry.doc, digest.hexdigest())
        return counts, least

    def _window(self, block: int, last: int, ends_of: _EndsCache) -> np.ndarray:
        """The ends of `block` and of as many blocks after it as it takes to reach token `last`."""
        beyond = block + 1
        while beyond < len(self._last_ends) and self._last_ends[beyond - 1] < last:
            beyond += 1
        parts = [ends_of(self, self._index, number) for number in range(block, beyond)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_block(self, block: int) -> None:
        first = block * CRC_BLOCK_BYTES
        count = min(CRC_BLOCK_BYTES, self.entry.tok.bytes - first)
        found = zlib.crc32(self._files.read(self._tok, self._offset + first, count))
        self._compare_crc(self.entry.tok, first, found, block)
        self._checked[block >> 3] |= 1 << (block & 7)

    def _compare_crc(self, entry: FileEntry, offset: int, found: int, number: int) -> None:
        checksums, _ = self._checksums
        expected = int.from_bytes(self._files.read(checksums, 4 * number, 4), "little")
        if found != expected:
            raise DataError(
                f"offset {offset}: expected CRC-32 {expected:08x}, found {found:08x}: this block was changed",
                field=self._files.path(entry.file),
                fix=RESTORE,
            )

    def _compare(self, entry: FileEntry, found: str) -> None:
        if found != entry.sha256:
            raise DataError(
                f"expected SHA-256 {entry.sha256}, found {found}", field=self._files.path(entry.file), fix=RESTORE
            )


class _EndsCache:
    """A few blocks of document ends, the least recently used one forgotten."""

    def __init__(self, check_crc: bool) -> None:
        self._check_crc = check_crc
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __call__(self, shard: _Shard, index: int, block: int) -> np.ndarray:
        key = (index, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        self._blocks[key] = ends = shard.read_ends(block, check_crc=self._check_crc)
        if len(self._blocks) > _CACHED_ENDS_BLOCKS:
            self._blocks.popitem(last=False)
        return ends


class ShardSet:
    """A dataset directory opened for reading. Ids come as little-endian uint16 or uint32 arrays.

    `manifest` is the checked manifest, `directory` where it lies, `dtype` the type of the ids.
    """

    def __init__(self, files: Files, manifest: Manifest, *, check_crc: bool = True, field: str = "dataset") -> None:
        self.directory, self.manifest, self._check_crc, self._field = files.directory, manifest, check_crc, field
        self._files = files
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        assert self.dtype.itemsize == DTYPE_BYTES[manifest.dtype]
        self._smallest_maximum = min(shard.max_id for shard in manifest.shards)
        self._shards: dict[int, _Shard] = {}
        self._ends = _EndsCache(check_crc)
        self._expected: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        check_crc: bool = True,
        reader: str = "pread",
        field: str = "dataset",
        cache: str = CACHE,
        cache_gib: float = CACHE_GIB,
    ) -> ShardSet:
        """Open a dataset; `reader` is a key of `files.READERS`, `field` the configuration key that named it.

        A URL is read through blocks kept in the directory `cache`, of `cache_gib` GiB. Raises ConfigError when there is
        no dataset there, DataError when the manifest or a file's size is wrong, and for a URL as `remote.open_remote`.
        """
        if "://" in str(directory):
            # Only here: whoever reads local files needs neither its memory nor its time.
            from kha_train.data.remote import open_remote

            files, manifest = open_remote(str(directory), Path(cache).expanduser(), int(cache_gib * 2**30), field=field)
            # Its files compare every block with its checksum themselves.
            return cls(files, manifest, check_crc=False, field=field)
        directory = Path(directory)
        manifest = manifests.load(directory, field=field)
        for shard in manifest.shards:
            for entry, offset in ((shard.tok, shard.tok_offset), (shard.doc, 0), (shard.crc, 0)):
                _check_size(directory / entry.file, offset + entry.bytes)
        return cls(READERS[reader](directory), manifest, check_crc=check_crc, field=field)

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

    def gather(self, shards_N: np.ndarray, starts_N: np.ndarray, out_NL: np.ndarray) -> None:
        """Fill row j of `out_NL` with ids of shard `shards_N[j]` from `starts_N[j]` on.

        `out_NL` is contiguous and of this dataset's `dtype`. Raises DataError when they are damaged.
        """
        shards = [self._shards.get(index) or self._shard(index) for index in shards_N.tolist()]
        starts = starts_N.tolist()
        if not out_NL.size:
            return
        if self._check_crc:
            for shard, start in zip(shards, starts, strict=True):
                shard.check_blocks(start, out_NL.shape[1])
        places = [shard.place(start) for shard, start in zip(shards, starts, strict=True)]
        self._files.read_rows(places, out_NL[0].nbytes, memoryview(out_NL).cast("B"))
        if np.maximum.reduce(out_NL, axis=None) > self._smallest_maximum:
            for row_L, shard, start in zip(out_NL, shards, starts, strict=True):
                shard.check_largest(start, row_L)

    @property
    def looks_ahead(self) -> bool:
        """Whether `expect` is of any use."""
        return self._files.looks_ahead

    def expect(self, shards_N: np.ndarray, starts_N: np.ndarray, lengths_N: np.ndarray, *, ends: bool) -> None:
        """All reads that are known to come, in their order: ids from `starts_N[j]` on in shard `shards_N[j]`, and with
        `ends` the document ends among them before. Raises DataError when checksums are damaged."""
        fresh = [self.manifest.shards[i].crc for i in np.unique(shards_N).tolist() if i not in self._shards]
        if fresh:
            self._files.expect((*((entry.file, 0, entry.bytes) for entry in fresh), *self._expected))
        shards = [self._shard(index) for index in shards_N.tolist()]
        rows = list(zip(shards, starts_N.tolist(), lengths_N.tolist(), strict=True))
        places = dict.fromkeys(shard.ends_place(start) for shard, start, _ in rows) if ends else ()
        reads = ((*shard.place(start), length * self.dtype.itemsize) for shard, start, length in rows)
        self._expected = (*places, *reads)
        self._files.expect(self._expected)

    def document_ends(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The exclusive document ends e of a shard with start < e <= stop, int64. Raises DataError when damaged."""
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        starts_N = np.asarray([start], dtype=np.int64)
        return self._shard(shard).ends_in_rows(starts_N, stop - start, self._ends)[1] + start

    def ends_in_rows(self, shards_N: np.ndarray, starts_N: np.ndarray, length: int) -> np.ndarray:
        """Where documents end in rows of `length` tokens laid end to end: ascending int64 numbers j * length + e.

        e in (0, length] is an exclusive document end relative to the first token of row j. Raises DataError when the
        ends are damaged.
        """
        found = [np.empty(0, dtype=np.int64)]
        for shard in np.unique(shards_N).tolist():
            inside = np.flatnonzero(shards_N == shard)
            numbers, ends = self._shard(shard).ends_in_rows(starts_N[inside], length, self._ends)
            found.append(inside[numbers] * length + ends)
        return np.sort(np.concatenate(found))

    def check_tokenizer(self) -> Path | None:
        """The tokenizer file beside the manifest, or None when the dataset has none (synthetic or imported ids).

        Raises DataError when it is missing or is not the one that made the ids.
        """
        entry = self.manifest.tokenizer
        if entry.file is None:
            return None
        path = self.directory / entry.file
        fix = "put back the file that made the dataset, or tokenize again"
        if not path.is_file():
            raise DataError("the tokenizer file is missing", field=self._field, value=str(path), fix=fix)
        found = sha256_of_file(path)
        if found != entry.sha256:
            raise DataError(
                f"not the tokenizer that made this dataset: expected SHA-256 {entry.sha256}, found {found}",
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

    def document_lengths(self) -> Iterator[np.ndarray]:
        """The tokens of every document, int64, shard by shard: their checksums are compared whatever `check_crc` says,
        because what is made of them is kept. Raises DataError when the ends are damaged."""
        for index, entry in enumerate(self.manifest.shards):
            shard = self._shard(index)
            blocks = range(-(-entry.documents // ENDS_PER_BLOCK))
            yield np.diff(np.concatenate([shard.read_ends(block, check_crc=True) for block in blocks]), prepend=0)

    def _shard(self, index: int) -> _Shard:
        shard = self._shards.get(index)
        if shard is None:
            entry = self.manifest.shards[index]
            shard = self._shards[index] = _Shard(index, entry, self._files, self.dtype, self._check_crc)
        return shard


def _check_size(path: Path, expected: int) -> None:
    """Raises DataError unless `path` is a file of `expected` bytes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", field=str(path), fix="restore the file") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
        raise DataError(
            f"offset {min(status.st_size, expected)}: expected {expected} bytes, found {status.st_size}",
            field=str(path),
            fix=RESTORE,
        )
