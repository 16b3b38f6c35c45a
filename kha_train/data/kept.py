"""A disk cache of arrays shared by processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from kha_train.data.format.canonical import sha256_of_file
from kha_train.errors import KhaError, MachineError
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, read_regular
from kha_train.foreign.typed import Source

DIGESTS = "digests.json"
SUFFIX = ".npy"


def kept_arrays(
    directory: Path, make: Callable[[], dict[str, np.ndarray]], names: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays in `directory`, read-only, by name. They are made if missing or damaged, or if one of `names` is
    missing.

    One process makes them while the others wait; if it dies, the next one starts. Raises MachineError when the
    directory cannot be written.
    """
    if not _is_whole(directory, names):
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with open(directory.with_suffix(".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_whole(directory, names):
                    _write(directory, make())
        except OSError as error:
            raise MachineError(
                f"cannot be written: {error.strerror}",
                field=str(directory),
                fix="free some space, or set another data.cache_dir",
            ) from error
    return {name.removesuffix(SUFFIX): _mapped(directory / name) for name in _digests(directory)}


def _is_whole(directory: Path, names: Collection[str]) -> bool:
    """Whether every array exists as a regular file and is unchanged."""
    try:
        digests = _digests(directory)
        if directory.is_symlink() or not digests or not {f"{name}{SUFFIX}" for name in names} <= digests.keys():
            return False
        for name, digest in digests.items():
            if not stat.S_ISREG(os.lstat(directory / name).st_mode) or sha256_of_file(directory / name) != digest:
                return False
            _mapped(directory / name)
    except (OSError, ValueError, KhaError):
        return False
    return True


def _digests(directory: Path) -> dict[str, str]:
    """Name of an array's file -> SHA-256. Raises ValueError or DataError for a malformed file."""
    path = directory / DIGESTS
    found = Source(str(path)).read(dict[str, str], parse_json(read_regular(path, SMALL) or b""))
    return {name: digest for name, digest in found.items() if re.fullmatch(rf"[A-Za-z0-9_-]+\{SUFFIX}", name)}


def _mapped(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _write(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    made = directory.with_suffix(f".{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name, array in arrays.items():
        np.save(made / f"{name}.npy", array)
    (made / DIGESTS).write_text(json.dumps({path.name: sha256_of_file(path) for path in sorted(made.glob("*.npy"))}))
    if directory.is_symlink() or not directory.is_dir():
        directory.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(made, directory)
