"""Opens files that somebody else may have put there: a directory or a FIFO in their place is an error, not a hang."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kha_train.errors import DataError, KhaError

SMALL = 16 * 2**20
"""Size limit, in bytes, of a settings or state file."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular(path: Path, limit: int | None = None, error: type[KhaError] = DataError) -> bytes | None:
    """The bytes of the file `path` (a link to a file is followed); None when there is none.

    Raises `error` when `path` is not a regular file, or has more than `limit` bytes; OSError when it cannot be read.
    """
    with open_regular(path, error) as file:
        if file is None:
            return None
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise error("too large", field=str(path), value=f"{size} bytes", allowed=f"at most {limit}")
        return file.read()


@contextmanager
def open_regular(path: Path, error: type[KhaError] = DataError) -> Iterator[BinaryIO | None]:
    """The file `path`, open for reading inside the `with` block; None when there is none. Raises as `read_regular`."""
    descriptor = _opened(path, error)
    if descriptor is None:
        yield None
        return
    try:
        _check_kind(path, os.fstat(descriptor).st_mode, error)
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _opened(path: Path, error: type[KhaError]) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as caught:
        if caught.errno == errno.ENXIO:
            check_regular(path, error)
        raise


def check_regular(path: Path, error: type[KhaError] = DataError) -> None:
    """Raises `error` when `path` exists but is neither a regular file nor a link to one."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    _check_kind(path, mode, error)


def _check_kind(path: Path, mode: int, error: type[KhaError]) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise error(f"is {kind} where a file is expected", field=str(path), fix="move it away")
