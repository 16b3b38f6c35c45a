"""Reads datasets of format version 1, and detects data that do not match their manifest.

On opening: the manifest and the size of every file. When a shard's checksums or document ends are first needed: the
SHA-256 of its checksums. On the first access to a 64 KiB block of either: its CRC-32; one bit per block of tokens
remembers the check. On every read: the length, and the largest id. A fault is a DataError that names shard, offset,
expected and found value.
"""

# N rows  P pieces of any lengths

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from kha_train.config.home import in_home
from kha_train.data.format import manifest as manifests
from kha_train.data.format.canonical import sha256_of_file
from kha_train.data.format.files import READERS, RESTORE, Files
from kha_train.data.format.manifest import CRC_BLOCK_BYTES, DTYPE_BYTES, Manifest
from kha_train.data.format.shard import BlockBits, EndsCache, Shard, blocks_of
from kha_train.data.rows.ragged import runs, sums_before
from kha_train.errors import DataError

CACHE, CACHE_GIB = "~/.cache/kha_train/data", 100.0
_BLOCK_SHIFT = CRC_BLOCK_BYTES.bit_length() - 1
_CHUNK_BYTES = 1 << 20


class ShardSet:
    """A dataset directory opened for reading. Ids are little-endian uint16 or uint32 arrays.

    `manifest` is the checked manifest, `directory` the dataset's directory, `dtype` the type of the ids.
    """

    def __init__(self, files: Files, manifest: Manifest, *, check_crc: bool = True, field: str = "dataset") -> None:
        self.directory, self.manifest, self._check_crc, self._field = files.directory, manifest, check_crc, field
        self._files = files
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        assert self.dtype.itemsize == DTYPE_BYTES[manifest.dtype]
        self._names = [shard.tok.file for shard in manifest.shards]
        self._offsets = np.asarray([shard.tok_offset for shard in manifest.shards], dtype=np.int64)
        self._maxima = np.asarray([shard.max_id for shard in manifest.shards], dtype=np.int64)
        self._smallest_maximum = int(self._maxima.min())
        self._first_tokens = sums_before(np.asarray([shard.tokens for shard in manifest.shards]))
        self._first_blocks = sums_before(np.asarray([blocks_of(shard) for shard in manifest.shards]))
        self._checked = BlockBits(int(self._first_blocks[-1]) if check_crc else 0)
        self._shards: dict[int, Shard] = {}
        self._ends = EndsCache([shard.documents for shard in manifest.shards], check_crc)
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
        cache_readers: int = 1,
    ) -> ShardSet:
        """Open a dataset; `reader` is a key of `files.READERS`, `field` the configuration key that named it.

        A URL is read through blocks kept in the directory `cache` of `cache_gib` GiB, shared by `cache_readers` such
        datasets in all processes of this node. Raises ConfigError when there is no dataset, DataError when the manifest
        or a file's size is wrong, and for a URL as `remote.open_remote`.
        """
        if "://" in str(directory):
            # Imported here, because reading local files needs neither its memory nor its time.
            from kha_train.data.remote.store import open_remote

            size = int(cache_gib * 2**30)
            files, manifest = open_remote(str(directory), in_home(str(cache)), size, readers=cache_readers, field=field)
            # Remote files compare every block with its checksum themselves.
            return cls(files, manifest, check_crc=False, field=field)
        directory = Path(directory)
        manifest = manifests.load(directory, field=field)
        for shard in manifest.shards:
            for entry, offset in ((shard.tok, shard.tok_offset), (shard.doc, 0), (shard.crc, 0)):
                _check_size(directory / entry.file, offset + entry.bytes)
        return cls(READERS[reader](directory), manifest, check_crc=check_crc, field=field)

    @property
    def content_id(self) -> str:
        """The id of the data itself (SHA-256 in hexadecimal)."""
        return self.manifest.content_id

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer that made the dataset."""
        return self.manifest.tokenizer.vocab

    @property
    def bytes_per_id(self) -> np.ndarray:
        """int64 [V]: the number of text bytes of each id; 0 for control ids."""
        return np.asarray(self.manifest.tokenizer.bytes_per_id, dtype=np.int64)

    def read(self, shard: int, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count) of a shard, read-only. Raises DataError when they are damaged."""
        assert 0 <= start and count >= 0 and start + count <= self.manifest.shards[shard].tokens, (start, count)
        if not count:
            return np.empty(0, dtype=self.dtype)
        ids = self.gather(*(np.asarray([number]) for number in (shard, start, count)))
        ids.flags.writeable = False
        return ids

    def gather(self, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Pieces concatenated: `lengths_P[j]` ids, at least one, of shard `shards_P[j]`, starting at `starts_P[j]`.

        Raises DataError when they are damaged.
        """
        return next(self.gather_in_parts(shards_P, starts_P, lengths_P, (0, len(shards_P))))

    def gather_in_parts(
        self, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray, bounds: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """As `gather`, one part at a time as requested: part k has pieces [bounds[k], bounds[k + 1])."""
        names, offsets, sizes = self._places(shards_P, starts_P, lengths_P)
        all_checked = not self._unchecked_blocks(shards_P, starts_P, lengths_P)
        for first, last in pairwise(bounds):
            part = slice(first, last)
            pieces = shards_P[part], starts_P[part], lengths_P[part]
            if not all_checked:
                self._check_blocks(self._unchecked_blocks(*pieces))
            # Not assigned to a name: a suspended generator keeps what its names refer to.
            yield self._ids(self._files.read_pieces(names[part], offsets[part], sizes[part]), *pieces)

    def _ids(self, data: bytearray, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """The ids of pieces that were read. Raises DataError when one is above the largest id of its shard."""
        ids = np.frombuffer(data, dtype=self.dtype)
        if np.maximum.reduce(ids, initial=0) > self._smallest_maximum:
            self._check_largest(ids, shards_P, starts_P, lengths_P)
        return ids

    @property
    def looks_ahead(self) -> bool:
        """Whether `expect` has an effect."""
        return self._files.looks_ahead

    def expect(self, plans: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], *, ends: bool) -> None:
        """Announce all upcoming reads, plan by plan. Each plan reads, with `ends`, the document ends in its pieces,
        then the pieces (shards, first tokens, lengths), in order. Raises DataError when checksums are damaged.
        """
        shards = np.unique(np.concatenate([shards_P for shards_P, _, _ in plans])).tolist()
        fresh = [self.manifest.shards[index].crc for index in shards if index not in self._shards]
        if fresh:
            self._files.expect((*((entry.file, 0, entry.bytes) for entry in fresh), *self._expected))
        self._expected = tuple(chain.from_iterable(self._reads(*plan, ends=ends) for plan in plans))
        self._files.expect(self._expected)

    def _reads(
        self, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray, *, ends: bool
    ) -> Iterator[tuple[str, int, int]]:
        """(file, offset, bytes) of the reads of a plan. A plan that needs document ends needs all of them before any
        row.
        """
        if ends:
            rows = zip(shards_P.tolist(), starts_P.tolist(), strict=True)
            yield from dict.fromkeys(self._shard(shard).ends_place(start) for shard, start in rows)
        yield from zip(*self._places(shards_P, starts_P, lengths_P), strict=True)

    def _places(
        self, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray
    ) -> tuple[list[str], list[int], list[int]]:
        """The files of pieces, their offsets there, and their sizes in bytes."""
        width = self.dtype.itemsize
        names = [self._names[shard] for shard in shards_P.tolist()]
        return names, (self._offsets[shards_P] + starts_P * width).tolist(), (lengths_P * width).tolist()

    def document_ends(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The exclusive document ends e of a shard with start < e <= stop, int64. Raises DataError when damaged."""
        assert stop <= self.manifest.shards[shard].tokens, stop
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        return self.ends_in_rows(np.asarray([shard]), np.asarray([start]), stop - start) + start

    def ends_in_rows(self, shards_N: np.ndarray, starts_N: np.ndarray, length: int) -> np.ndarray:
        """The ends of documents in rows of `length` tokens laid end to end: ascending int64 numbers j * length + e.

        e in (0, length] is an exclusive document end relative to the first token of row j. Raises DataError when the
        ends are damaged.
        """
        near = [np.empty(0, dtype=np.int64)]
        for shard in np.unique(shards_N).tolist():
            starts = np.sort(starts_N[shards_N == shard])
            before = self._first_tokens[shard]
            near += [ends + before for ends in self._shard(shard).ends_near(starts, length, self._ends)]
        # Tokens are counted through all shards, so one search serves all rows.
        near_ends = np.concatenate(near)
        first_N = self._first_tokens[shards_N] + starts_N
        low_N, high_N = (near_ends.searchsorted(places, side="right") for places in (first_N, first_N + length))
        counts_N = high_N - low_N
        shifts = np.repeat(np.arange(len(first_N)) * length - first_N, counts_N)
        document_ends: np.ndarray = near_ends[runs(low_N, counts_N)] + shifts
        return document_ends

    def check_tokenizer(self) -> Path | None:
        """The tokenizer file beside the manifest, or None when the dataset has none (synthetic or imported ids).

        Raises DataError when it is missing or is not the one that made the ids.
        """
        entry = self.manifest.tokenizer
        if entry.file is None:
            return None
        path, where = self.directory / entry.file, self._files.path(entry.file)
        fix = "restore the file that made the dataset, or tokenize again"
        if not path.is_file():
            raise DataError("the tokenizer file is missing", field=self._field, value=where, fix=fix, code="E16")
        found = sha256_of_file(path)
        if found != entry.sha256:
            problem = f"not the tokenizer that made this dataset: expected SHA-256 {entry.sha256}, found {found}"
            raise DataError(problem, field=self._field, value=where, fix=fix, code="E17")
        return path

    def token_counts(self, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """int64 [V]: the number of occurrences of each id. Reads and checks everything; `progress` receives token
        counts.

        Raises DataError for any fault, including wrong totals in the manifest.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for index, entry in enumerate(self.manifest.shards):
            found = self.verify(index)
            counts[: len(found)] += found
            if progress is not None:
                progress(entry.tokens)
        return counts

    def verify(self, index: int) -> np.ndarray:
        """int64 [max_id + 1]: the number of occurrences of each id in shard `index`. Reads every byte and compares it
        with checksums, digests and the manifest's figures. Raises DataError for the first fault.
        """
        entry, shard = self.manifest.shards[index], self._shard(index)
        counts, least, digest = np.zeros(entry.max_id + 1, dtype=np.int64), entry.max_id, hashlib.sha256()
        step, blocks = _CHUNK_BYTES // self.dtype.itemsize, _CHUNK_BYTES // CRC_BLOCK_BYTES
        first, last = self._first_blocks[index : index + 2].tolist()
        for number, start in enumerate(range(0, entry.tokens, step)):
            if self._check_crc:
                # Blocks checked before are checked again, together with what is read next, so that a disk delivers them
                # once.
                self._check_blocks(range(first + number * blocks, min(first + (number + 1) * blocks, last)))
            ids = self.read(index, start, min(step, entry.tokens - start))
            digest.update(ids.tobytes())
            counts += np.bincount(ids, minlength=len(counts))
            least = min(least, int(ids.min()))
        shard.compare_digest(entry.tok, digest.hexdigest())
        for _ in shard.check_ends():
            pass
        found = (least, int(np.flatnonzero(counts)[-1]), int(counts @ self.bytes_per_id[: len(counts)]))
        expected = (entry.min_id, entry.max_id, entry.text_bytes)
        if found != expected:
            problem = f"expected (min id, max id, text bytes) {expected}, found {found}"
            raise DataError(problem, field=self._files.path(entry.tok.file))
        return counts

    def document_lengths(self) -> Iterator[np.ndarray]:
        """The tokens of every document, int64, shard by shard. Checksums are compared even without `check_crc`, because
        the result is cached on disk. Raises DataError when the ends are damaged.
        """
        for index in range(len(self.manifest.shards)):
            yield np.diff(np.concatenate(list(self._shard(index).check_ends())), prepend=0)

    def _shard(self, index: int) -> Shard:
        shard = self._shards.get(index)
        if shard is None:
            shard = self._shards[index] = Shard(index, self.manifest.shards[index], self._files)
        return shard

    def _unchecked_blocks(self, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray) -> list[int]:
        """The blocks of pieces, numbered through all shards, that were not yet compared with their checksums."""
        if not self._check_crc:
            return []
        before_P, width = self._first_blocks[shards_P], self.dtype.itemsize
        first_P = before_P + (starts_P * width >> _BLOCK_SHIFT)
        last_P = before_P + ((starts_P + lengths_P) * width - 1 >> _BLOCK_SHIFT)
        return self._checked.missing(runs(first_P, last_P - first_P + 1))

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        """Compare blocks with their checksums."""
        for block in blocks:
            index = int(self._first_blocks.searchsorted(block, side="right")) - 1
            self._shard(index).check_block(block - int(self._first_blocks[index]))
            self._checked.add(block)

    def _check_largest(
        self, ids: np.ndarray, shards_P: np.ndarray, starts_P: np.ndarray, lengths_P: np.ndarray
    ) -> None:
        """Raises DataError when an id is above the largest of its shard."""
        places_P = np.cumsum(lengths_P) - lengths_P
        largest_P, expected_P = np.maximum.reduceat(ids, places_P), self._maxima[shards_P]
        for j in np.flatnonzero(largest_P > expected_P).tolist():
            where = int(ids[places_P[j] : places_P[j] + lengths_P[j]].argmax())
            raise DataError(
                f"token {starts_P[j] + where}: expected an id of at most {expected_P[j]}, found {largest_P[j]}",
                field=self._files.path(self._names[shards_P[j]]),
                fix=RESTORE,
            )


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
