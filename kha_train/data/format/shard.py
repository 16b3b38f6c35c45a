"""One shard of a dataset: its checksums and the ends of its documents. `shards.ShardSet` reads its ids."""

# N rows  E document ends

from __future__ import annotations

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from kha_train.data.format.files import RESTORE, Files
from kha_train.data.format.manifest import CRC_BLOCK_BYTES, ENDS_PER_BLOCK, FileEntry, ShardEntry
from kha_train.data.rows.ragged import spanned, sums_before
from kha_train.errors import DataError

_CACHED_ENDS_BLOCKS = 64


class Shard:
    """Shard number `index`: checks blocks of 64 KiB and finds document ends; `entry` is its entry in the manifest.
    Every method raises DataError when the bytes do not match the manifest.
    """

    def __init__(self, index: int, entry: ShardEntry, files: Files) -> None:
        self.index, self.entry, self._files = index, entry, files

    @cached_property
    def _checksums(self) -> tuple[str, np.ndarray]:
        """The checksum file, checked against the manifest, and the last document end of each block of ends.

        The checksums themselves stay in their file: terabytes of tokens have hundreds of megabytes of them.
        """
        crc, ends_blocks = self.entry.crc, -(-self.entry.documents // ENDS_PER_BLOCK)
        data = self._files.read(crc.file, 0, crc.bytes)
        self.compare_digest(crc, hashlib.sha256(data).hexdigest())
        last_ends = np.frombuffer(data, dtype="<i8", offset=4 * (self.blocks + ends_blocks)).astype(np.int64)
        if int(last_ends[-1]) != self.entry.tokens:
            raise DataError(
                f"the last document ends at token {last_ends[-1]}, the manifest has {self.entry.tokens} tokens",
                field=self._files.path(crc.file),
            )
        return crc.file, last_ends

    @property
    def _last_ends(self) -> np.ndarray:
        return self._checksums[1]

    @property
    def blocks(self) -> int:
        """Number of checksum blocks of the ids."""
        return blocks_of(self.entry)

    def check_block(self, block: int) -> None:
        """Compare a block of ids with its checksum."""
        first = block * CRC_BLOCK_BYTES
        count = min(CRC_BLOCK_BYTES, self.entry.tok.bytes - first)
        found = zlib.crc32(self._files.read(self.entry.tok.file, self.entry.tok_offset + first, count))
        self._compare_crc(self.entry.tok, first, found, block)

    def ends_near(self, starts_N: np.ndarray, length: int, ends_of: EndsCache) -> Iterator[np.ndarray]:
        """Ascending runs of document ends: all e with start < e <= start + length for one of the ascending `starts_N`,
        and possibly others. Only one block is in memory at a time, because rows may lie in any number of blocks.
        """
        first_N = self._last_ends.searchsorted(starts_N, side="right")
        last_N = self._last_ends.searchsorted(starts_N + length)
        blocks = spanned(first_N, last_N)
        lows = starts_N[last_N.searchsorted(blocks)].tolist()
        highs = (starts_N[first_N.searchsorted(blocks, side="right") - 1] + length).tolist()
        for block, low, high in zip(blocks.tolist(), lows, highs, strict=True):
            ends = ends_of(self, block)
            yield ends[ends.searchsorted(low, side="right") : ends.searchsorted(high, side="right")]

    def ends_place(self, start: int) -> tuple[str, int, int]:
        """File, offset and size of the document ends, beginning with the first one after token `start`."""
        return self._ends_block(int(self._last_ends.searchsorted(start, side="right")))

    def _ends_block(self, block: int) -> tuple[str, int, int]:
        first = block * CRC_BLOCK_BYTES
        return self.entry.doc.file, first, min(CRC_BLOCK_BYTES, self.entry.doc.bytes - first)

    def ends(self, block: int) -> np.ndarray:
        """The document ends of one 64 KiB block of `.doc`, as stored: int64, valid only until the next call."""
        return np.frombuffer(self._files.look(*self._ends_block(block)), dtype="<i8")

    def check_ends_of(self, block: int, *, check_crc: bool) -> np.ndarray:
        """Checks that `ends` ascend and, with `check_crc`, match their checksum."""
        _, first, _ = place = self._ends_block(block)
        data = self._files.read(*place)
        if check_crc:
            self._compare_crc(self.entry.doc, first, zlib.crc32(data), self.blocks + block)
        ends = np.frombuffer(data, dtype="<i8")
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

    def check_ends(self) -> Iterator[np.ndarray]:
        """Check the document ends block by block against their checksums, then all of them against their digest."""
        digest = hashlib.sha256()
        for block in range(len(self._last_ends)):
            ends = self.check_ends_of(block, check_crc=True)
            digest.update(ends.tobytes())
            yield ends
        self.compare_digest(self.entry.doc, digest.hexdigest())

    def compare_digest(self, entry: FileEntry, found: str) -> None:
        """Compare the SHA-256 of a file with the manifest's."""
        if found != entry.sha256:
            raise DataError(
                f"expected SHA-256 {entry.sha256}, found {found}", field=self._files.path(entry.file), fix=RESTORE
            )

    def _compare_crc(self, entry: FileEntry, offset: int, found: int, number: int) -> None:
        checksums, _ = self._checksums
        expected = int.from_bytes(self._files.read(checksums, 4 * number, 4), "little")
        if found != expected:
            raise DataError(
                f"offset {offset}: expected CRC-32 {expected:08x}, found {found:08x}: this block was changed",
                field=self._files.path(entry.file),
                fix=RESTORE,
            )


class BlockBits:
    """A set of block numbers below `count`, one bit each; memory is allocated by whole pages as bits are set."""

    def __init__(self, count: int) -> None:
        self._bits = np.zeros(-(-count // 8), dtype=np.uint8)

    def add(self, block: int) -> None:
        """Add one number."""
        self._bits[block >> 3] |= 1 << (block & 7)

    def __contains__(self, block: int) -> bool:
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    def missing(self, blocks: np.ndarray) -> list[int]:
        """The numbers that are not in the set, each once, ascending."""
        bits = self._bits[blocks >> 3] >> (blocks & 7).astype(np.uint8) & 1
        missing: list[int] = np.unique(blocks[bits == 0]).tolist()
        return missing


class EndsCache:
    """The document ends of shards with the given numbers of `documents`, block by block: each checked on first use, and
    the last few kept.
    """

    def __init__(self, documents: Sequence[int], check_crc: bool) -> None:
        self._first_blocks = sums_before(-(-np.asarray(documents) // ENDS_PER_BLOCK)).tolist()
        self._checked, self._check_crc = BlockBits(self._first_blocks[-1]), check_crc
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, shard: Shard, block: int) -> np.ndarray:
        """The document ends of a block, int64. Raises DataError when they are damaged."""
        number = self._first_blocks[shard.index] + block
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        if number not in self._checked:
            shard.check_ends_of(block, check_crc=self._check_crc)
            self._checked.add(number)
        self._blocks[number] = ends = shard.ends(block)
        if len(self._blocks) > _CACHED_ENDS_BLOCKS:
            self._blocks.popitem(last=False)
        return ends


def blocks_of(entry: ShardEntry) -> int:
    """Number of checksum blocks of the ids of a shard."""
    return -(-entry.tok.bytes // CRC_BLOCK_BYTES)
