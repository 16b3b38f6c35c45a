"""Exact reads from the files of a dataset, by `pread` or through a memory map.

`pread` is the default: a file truncated while it is read gives a short read, which can be told, on any file system. A
memory map of a local file is cheaper, but a page that is no longer there kills the process by SIGBUS,
which no program text can turn into an error: `ShardSet.open` checks the sizes, and nothing protects the time after.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from kha_train.errors import DataError

OPEN_FILES = 128
RESTORE = "restore the file, or write the dataset again"


class Files:
    """Reads by `pread` from many files with few descriptors open: the least recently used one is closed.

    Threads may read at once. `looks_ahead` tells whether `expect` is of any use.
    """

    looks_ahead = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # A descriptor must not be closed, and its number given to another file, between look-up and read.
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes of a file from `offset` on. Raises DataError when they are not there."""
        try:
            with self._lock:
                data = os.pread(self._descriptor(name), count, offset)
        except OSError as error:
            raise self._unreadable(name, offset, error) from error
        if len(data) != count:
            raise self._truncated(name, offset, count, len(data))
        return data

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` (of bytes) with the bytes of a file from `offset` on. Raises DataError as `read`."""
        try:
            with self._lock:
                found = os.preadv(self._descriptor(name), (out,), offset)
        except OSError as error:
            raise self._unreadable(name, offset, error) from error
        if found != len(out):
            raise self._truncated(name, offset, len(out), found)

    def read_pieces(self, names: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> bytearray:
        """Pieces laid end to end: `sizes[j]` bytes from `offsets[j]` on in file `names[j]`. Raises DataError as
        `read`."""
        # Joining pieces is the cheapest way there is in Python to copy many small ones.
        return bytearray().join([self.read(*place) for place in zip(names, offsets, sizes, strict=True)])

    def expect(self, places: Iterable[tuple[str, int, int]]) -> None:
        """All reads (name, offset, bytes) that are known to come, in their order."""

    def path(self, name: str) -> str:
        """The path of a file, for messages."""
        return str(self.directory / name)

    def _unreadable(self, name: str, offset: int, error: OSError) -> DataError:
        """A DataError for a read that the system refused."""
        return DataError(f"offset {offset}: cannot be read: {error.strerror}", field=self.path(name), fix=RESTORE)

    def _truncated(self, name: str, offset: int, expected: int, found: int) -> DataError:
        """A DataError for a read that came back short."""
        return DataError(
            f"offset {offset}: expected {expected} bytes, found {found}: the file was truncated",
            field=self.path(name),
            fix=RESTORE,
        )

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        descriptor = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open[name] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


class MappedFiles(Files):
    """`Files` whose `read_pieces` copies from memory maps; single small reads stay `pread`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._maps: dict[str, memoryview] = {}

    def read_pieces(self, names: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> bytearray:
        """As `Files.read_pieces`. Raises DataError when a file was too short when it was mapped."""
        maps = [self._maps.get(name) or self._map(name) for name in names]
        pieces = [mapped[first : first + size] for mapped, first, size in zip(maps, offsets, sizes, strict=True)]
        data = bytearray().join(pieces)
        if len(data) != sum(sizes):
            j = next(j for j, size in enumerate(sizes) if len(pieces[j]) != size)
            raise self._truncated(names[j], offsets[j], sizes[j], len(pieces[j]))
        return data

    def _map(self, name: str) -> memoryview:
        try:
            with self._lock:
                mapped = mmap.mmap(self._descriptor(name), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be mapped: {error}", field=self.path(name), fix="data.reader=pread") from error
        # Or else the first touch of a page reads megabytes around it from the disk.
        mapped.madvise(mmap.MADV_RANDOM)
        self._maps[name] = memoryview(mapped)
        return self._maps[name]


READERS = {"pread": Files, "memory_map": MappedFiles}


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
