"""Arrays that take long to make, made once by one process and memory-mapped by all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kha_train.data.canonical import sha256_of_file
from kha_train.errors import MachineError

DIGESTS = "digests.json"


def kept_arrays(directory: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in `directory`, read-only, by name; what is missing or damaged there is made again.

    Of several processes one makes them and the others wait; a process that dies lets the next one begin. Raises
    MachineError when the directory cannot be written.
    """
    if not _is_whole(directory):
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with open(directory.with_suffix(".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_whole(directory):
                    _write(directory, make())
        except OSError as error:
            raise MachineError(
                f"cannot be written: {error.strerror}", field=str(directory), fix="free some space, or data.cache_dir"
            ) from error
    names = json.loads((directory / DIGESTS).read_bytes())
    return {Path(name).stem: np.load(directory / name, mmap_mode="r") for name in names}


def _is_whole(directory: Path) -> bool:
    try:
        digests = json.loads((directory / DIGESTS).read_bytes())
        found = {name: sha256_of_file(directory / name) for name in digests}
    except (OSError, ValueError, TypeError):
        return False
    return bool(found) and found == digests


def _write(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    made = directory.with_suffix(f".{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name, array in arrays.items():
        np.save(made / f"{name}.npy", array)
    (made / DIGESTS).write_text(json.dumps({path.name: sha256_of_file(path) for path in sorted(made.glob("*.npy"))}))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(made, directory)
