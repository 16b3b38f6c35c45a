"""Exact reads from the files of a dataset, by `pread` or through a memory map.

`pread` is the default: a file truncated while it is read gives a short read, which can be detected, on any file system.
A memory map of a local file is faster. But if the file is truncated, the process dies with SIGBUS, which cannot be
caught: `ShardSet.open` checks the sizes once, and nothing protects later reads.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kha_train.errors import DataError, KhaError, MachineError

RESTORE = "restore the file, or write the dataset again"
_MOST_LIMIT = 65_536
_READS_ASKED_FOR = 16
_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)


class Files:
    """Reads by `pread` from many files with a limited number of descriptors: the least recently used one is closed.

    Threads may read at the same time. `looks_ahead` says whether `expect` has an effect. Reads raise DataError when the
    bytes do not exist, MachineError when the machine cannot deliver them.
    """

    looks_ahead = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._most_open = _most_open()
        # Between look-up and read, the descriptor must not be closed and its number given to another file.
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes of a file, starting at `offset`."""
        data = self._pread(name, offset, count)
        # One call reads at most 2 GiB.
        while len(data) < count and (more := self._pread(name, offset + len(data), count - len(data))):
            data += more
        if len(data) != count:
            raise self._truncated(name, offset, count, len(data))
        return data

    def look(self, name: str, offset: int, count: int) -> bytes | memoryview:
        """As `read`, for bytes of which only a few are used."""
        return self.read(name, offset, count)

    def read_pieces(self, names: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> bytearray:
        """Pieces concatenated: `sizes[j]` bytes starting at `offsets[j]` in file `names[j]`."""
        # Joining pieces is the cheapest way in Python to copy many small ones.
        return bytearray().join([self.read(*place) for place in zip(names, offsets, sizes, strict=True)])

    def expect(self, places: Iterable[tuple[str, int, int]]) -> None:
        """Announce all upcoming reads (name, offset, bytes), in order."""

    def path(self, name: str) -> str:
        """The path of a file, for messages."""
        return str(self.directory / name)

    def _pread(self, name: str, offset: int, count: int) -> bytes:
        try:
            with self._lock:
                return os.pread(self._descriptor(name), count, offset)
        except OSError as error:
            raise _unreadable(self.path(name), offset, error) from error

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
        if len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


class _Map(NamedTuple):
    """A file in memory, and a view of all its bytes that is cheap to slice."""

    file: mmap.mmap
    bytes: memoryview


class _Maps(dict[str, _Map]):
    """Maps of the files of a directory by name, made on first use; beyond `most` maps the oldest is dropped. Raises
    DataError and MachineError when a file cannot be mapped.
    """

    def __init__(self, directory: Path, most: int) -> None:
        super().__init__()
        self._directory, self._most, self._lock = directory, most, threading.Lock()

    def __missing__(self, name: str) -> _Map:
        with self._lock:
            if name in self:
                return self[name]
            if len(self) >= self._most:
                del self[next(iter(self))]
            self[name] = mapped = self._mapped(self._directory / name)
            return mapped

    def _mapped(self, path: Path) -> _Map:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                file = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(str(path), 0, error) from error
        except ValueError as error:
            raise DataError(f"cannot be mapped: {error}", field=str(path), fix=RESTORE) from error
        file.madvise(mmap.MADV_RANDOM)
        return _Map(file, memoryview(file))


class MappedFiles(Files):
    """`Files` that copies from memory maps, with the same limit on their number; a few small reads still use `pread`.

    The kernel gets the advice that reads are random; otherwise the first access to a page reads megabytes around it
    from a disk. It then fetches one page at a time. Where that happens, the pieces of the next reads are requested in
    advance.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._maps = _Maps(directory, self._most_open)
        self._reads_to_ask_for = 0

    def look(self, name: str, offset: int, count: int) -> bytes | memoryview:
        """As `Files.look`, without a copy."""
        piece = self._maps[name].bytes[offset : offset + count]
        if len(piece) != count:
            raise self._truncated(name, offset, count, len(piece))
        return piece

    def read_pieces(self, names: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> bytearray:
        """As `Files.read_pieces`; also for a file that was too short when it was mapped."""
        maps, places = self._maps, list(zip(names, offsets, sizes, strict=True))
        before = _major_faults()
        if self._reads_to_ask_for:
            self._reads_to_ask_for -= 1
            for name, first, size in places:
                file, page = maps[name].file, first & -mmap.PAGESIZE
                if page < len(file):
                    file.madvise(mmap.MADV_WILLNEED, page, first + size - page)
        pieces = [maps[name].bytes[first : first + size] for name, first, size in places]
        data = bytearray().join(pieces)
        if _major_faults() > before:
            self._reads_to_ask_for = _READS_ASKED_FOR
        if len(data) != sum(sizes):
            j = next(j for j, size in enumerate(sizes) if len(pieces[j]) != size)
            raise self._truncated(names[j], offsets[j], sizes[j], len(pieces[j]))
        return data


READERS = {"pread": Files, "memory_map": MappedFiles}


def _unreadable(path: str, offset: int, error: OSError) -> KhaError:
    """The error for a read that the system refused: a machine error or a data error."""
    problem = f"offset {offset}: cannot be read: {error.strerror}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return MachineError(problem, field=path, fix="allow more open files: ulimit -n")
    if error.errno in _MACHINE:
        return MachineError(problem, field=path)
    return DataError(problem, field=path, fix=RESTORE)


def _most_open() -> int:
    """A share of the files that this process may have open; raises the limit to the allowed maximum first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MOST_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(64, most // 8)


def _major_faults() -> int:
    """How many times this thread waited for a page from a disk."""
    return resource.getrusage(_THREAD).ru_majflt


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
