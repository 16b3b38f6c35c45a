"""A directory of checked blocks of remote files, limited in size and shared by all processes of a node.

A block gets its name by an atomic rename, so nobody sees part of one. If several processes want a block, one fetches it
and the others wait while that process lives, up to a time limit.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from kha_train.errors import ConfigError, KhaError, MachineError

READ_SECONDS = 60.0
"""Time limit for one attempt to read from a store, or to wait for another process that reads the same block. All
attempts together end well before a watchdog would report a hang.
"""
ABANDONED_SECONDS = 1200.0
"""A temporary file that was not touched for this long belongs to a dead process."""
SPARE_SHARE = 20
"""When a full cache is cleaned, this fraction (1 / SPARE_SHARE) is freed at once."""
_POLL_SECONDS = 0.02
_BLOCK = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_BLOCK = (errno.EISDIR, errno.ELOOP, errno.ESPIPE, errno.ENXIO)
"""Errors from opening or reading a directory, a link, a FIFO or a socket."""


class Cache:
    """A directory of blocks shared by processes, limited to `limit` bytes without the writers' temporary files.

    `readers` is the number of caches on this directory in all processes; together they prefetch at most half of it.
    Every method raises MachineError when the directory cannot be used, ConfigError when it is not a directory.
    """

    def __init__(self, directory: Path, limit: int, readers: int = 1) -> None:
        self.directory, self._limit, self._limit_ahead = directory, limit, limit // (2 * readers)
        self._lock = threading.Lock()
        self._upcoming: Counter[str] = Counter()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def has(self, name: str) -> bool:
        """Whether the block is in the cache."""
        return _is_block(self.directory / name)

    def read_into(self, name: str, offset: int, out: memoryview) -> bool:
        """Fill `out` with the bytes of a block, starting at `offset`; False when it is not in the cache. Removes a
        block that is too short, and anything else with its name (a directory, a link).
        """
        try:
            descriptor = os.open(self.directory / name, _BLOCK)
            try:
                if os.preadv(descriptor, (out,), offset) == len(out):
                    return True
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _NO_BLOCK:
                raise self._unwritable(error) from error
        self.remove(name)
        return False

    def expect(self, reads: Iterable[tuple[str, int]]) -> list[str]:
        """Announce all upcoming reads (block, bytes of the block), in order.

        Returns the blocks to prefetch, the next one first: as many as fill this reader's share, so that no block needed
        sooner is evicted. Touching blocks informs other readers of this node.
        """
        upcoming: Counter[str] = Counter()
        room = self._limit_ahead
        for name, size in reads:
            if name not in upcoming:
                if size > room:
                    continue
                room -= size
            upcoming[name] += 1
        ahead = list(upcoming)
        with self._lock:
            self._upcoming = upcoming
        for name in ahead:
            self._touch(name)
        return ahead

    def is_wanted(self, name: str) -> bool:
        """Whether the block will still be read."""
        return name in self._upcoming

    def used(self, name: str) -> None:
        """Record that a block was read."""
        with self._lock:
            if self._upcoming[name] > 1:
                self._upcoming[name] -= 1
            else:
                self._upcoming.pop(name, None)
        self._touch(name)

    def remove(self, name: str) -> None:
        """Remove a block, or anything else with its name; a process that is reading it is not disturbed."""
        path = self.directory / name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def put(self, name: str, get: Callable[[], bytes]) -> bool:
        """Store the block that `get` returns; False when another process was faster."""
        part = self.directory / f"{name}.part"
        own = self.directory / f"{name}.{os.getpid()}-{threading.get_ident()}.part"
        for other in (part, own, self.directory / name, self.directory / ".lock"):
            if os.path.lexists(other) and not _is_block(other):
                self.remove(other.name)
        try:
            with open(part, "ab", buffering=0) as file:
                deadline = time.monotonic() + READ_SECONDS
                while not _locked(file.fileno()) and time.monotonic() < deadline and not self.has(name):
                    time.sleep(_POLL_SECONDS)
                if self.has(name):
                    return False
                data = get()
                own.write_bytes(data)
                with open(self.directory / ".lock", "a+b") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    held = self._make_room(len(data), name, _recorded(lock))
                    _record(lock, held + len(data))
                    os.replace(own, self.directory / name)
                return True
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            for left in (own, part):
                self.remove(left.name)

    def _make_room(self, size: int, coming: str, held: int | None) -> int:
        """Remove blocks until `size` bytes fit: first those that no known step needs, least recently used first. Some
        more are removed, because listing all blocks takes long. `held` is the size of the cache, as far as known;
        returns its new size.
        """
        if held is not None and held + size <= self._limit:
            return held
        present = self._present(coming)
        held = sum(bytes_ for _, bytes_, _ in present)
        with self._lock:
            upcoming = set(self._upcoming)
        present.sort(key=lambda one: (one[0] in upcoming, one[2]))
        for name, bytes_, _ in present:
            spare = 0 if name in upcoming else self._limit // SPARE_SHARE
            if held + size + spare <= self._limit:
                break
            self.remove(name)
            held -= bytes_
        return held

    def _present(self, coming: str) -> list[tuple[str, int, int]]:
        """Name, size and last use of every block except `coming`; removes what dead processes left."""
        present = []
        for entry in os.scandir(self.directory):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if entry.name.endswith(".part"):
                if time.time() - status.st_mtime > ABANDONED_SECONDS:
                    self.remove(entry.name)
            elif entry.name not in (".lock", coming):
                present.append((entry.name, status.st_size, status.st_mtime_ns))
        return present

    def _touch(self, name: str) -> None:
        try:
            os.utime(self.directory / name)
        except OSError:
            # A block of another user can be read but not touched; at worst it is evicted early.
            return

    def _unwritable(self, error: OSError) -> KhaError:
        # If something else has the directory's name, trying again does not help.
        kind = ConfigError if error.errno in (errno.EEXIST, errno.ENOTDIR) else MachineError
        return kind(
            f"the cache of remote data cannot be used: {error.strerror or error}",
            field=f"data.cache_dir = {self.directory}",
            fix="free some space, lower data.cache_gib, or choose another data.cache_dir",
        )


def _is_block(path: Path) -> bool:
    """Whether the name belongs to a regular file: not a link or a directory."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _recorded(lock: BinaryIO) -> int | None:
    """The size of the cache as last recorded by any process; None where none did."""
    lock.seek(0)
    text = lock.read()
    return int(text) if text.isdigit() else None


def _record(lock: BinaryIO, held: int) -> None:
    lock.truncate(0)
    lock.write(str(held).encode())


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
