"""Holding a checkpoint of another run while it is read, so that the other run's retention leaves it.

The reader takes a shared lock on the directory itself, which writes nothing into it; retention removes only what it can
lock alone. The kernel drops the lock with its process. A rewind does not ask: a restart must not find what it undid. A
file system without such locks (some network ones) protects nothing. In both cases the reader ends with an error that
says so, and nothing wrong is read.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kha_train.errors import CheckpointError

_IN_USE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """While the block runs, no retention removes the checkpoint in `directory`. Any number of readers may hold it.

    Raises CheckpointError when it is being removed, OSError when the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if not _lock(descriptor, fcntl.LOCK_SH):
            raise CheckpointError(
                "its run is removing it", field=str(directory), fix="take a newer checkpoint, or one that is kept"
            )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone(directory: Path) -> Iterator[bool]:
    """Whether nobody holds the checkpoint in `directory`; nobody can begin to while the block runs.

    Raises OSError when the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Take the lock unless another one excludes it. True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _IN_USE
    return True
