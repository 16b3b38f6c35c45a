"""One live process owns a run directory. The kernel drops the lock when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from kha_train.errors import RunDirectoryInUse

LOCK_FILE = ".lock"


def take_lock(run_dir: Path) -> IO[str]:
    """Locks `run_dir` until the returned file is closed or the process dies.

    A POSIX record lock: unlike `flock` it is not inherited by forked children, so an orphaned worker of a killed run
    cannot keep its successor out. Two records of one process do not exclude each other. On a file system without
    locks nothing is locked. Raises RunDirectoryInUse, naming the owner.
    """
    file = (run_dir / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise RunDirectoryInUse(
            f"another process is training here: {owner}",
            field="run.dir",
            value=str(run_dir),
            fix="wait for it or stop it, or choose another run.dir",
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
