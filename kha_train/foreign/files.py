"""Opening a file that somebody else may have put there: a directory or a FIFO in its place is an error, not a hang."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from kha_train.errors import DataError, KhaError

SMALL = 16 * 2**20
"""Bytes that a file of settings or state has at most."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular(path: Path, limit: int | None = None, error: type[KhaError] = DataError) -> bytes | None:
    """The bytes of the file `path` (a link to one is followed); None when there is none.

    Raises `error` when something else than a file has its name, or when it has more than `limit` bytes; OSError when it
    cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as caught:
        if caught.errno == errno.ENXIO:
            check_regular(path, error)
        raise
    try:
        status = os.fstat(descriptor)
        _check_kind(path, status.st_mode, error)
        if limit is not None and status.st_size > limit:
            raise error("too large", field=str(path), value=f"{status.st_size} bytes", allowed=f"at most {limit}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def check_regular(path: Path, error: type[KhaError] = DataError) -> None:
    """Raises `error` when something else than a file, or a link to one, has the name `path`."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    _check_kind(path, mode, error)


def _check_kind(path: Path, mode: int, error: type[KhaError]) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise error(f"is {kind} where a file is expected", field=str(path), fix="move it away")
