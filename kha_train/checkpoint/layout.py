"""Names inside `<run.dir>/checkpoints`, and the few file system operations that must survive a kill.

    step-00001000                    published: holds a manifest, complete
    step-00001000.corrupt            was published, failed verification; kept for inspection, never read
    step-00001000.undone             a marked checkpoint that a rewind undid; kept, never read
    .step-00001000.saving-XXXX       being written; worthless until renamed
    .step-00001000.replaced-XXXX     the older checkpoint of that step, while a newer one takes its name; readable
    .step-00001000.deleting-XXXX     about to be deleted by retention

XXXX is a random number, so that a leftover rank of a dead attempt cannot write into the files of this one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kha_train.checkpoint.manifest import MANIFEST_FILE
from kha_train.record.files import sync_directory
from kha_train.record.reader import RUN_FILE

FOLDER = "checkpoints"
RING = "ring"
"""The directory in a run with checkpoints of the states before loss events (`train/ring.py`)."""
_READABLE = re.compile(r"step-([0-9]{8,15})|\.step-([0-9]{8,15})\.replaced-[0-9a-f]{12}")
_LEFTOVER = re.compile(r"\.step-[0-9]{8,15}\.(saving|deleting)-[0-9a-f]{12}")
_AWAY = (errno.ENOENT, errno.ENOTCONN, errno.ESTALE)


def step_name(step: int) -> str:
    """The directory name of a published checkpoint: `step-00001000`."""
    return f"step-{step:08d}"


def temporary_name(step: int, purpose: str) -> str:
    """A new hidden name; `purpose` is "saving", "replaced" or "deleting"."""
    return f".{step_name(step)}.{purpose}-{secrets.token_hex(6)}"


def step_of(name: str) -> int | None:
    """The step of a directory that may hold a checkpoint (published or replaced); None for any other name."""
    match = _READABLE.fullmatch(name)
    step = int(match[1] or match[2]) if match else -1
    return step if step_name(step) in name.split(".") else None


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything that may hold a checkpoint, newest step first, published before replaced.

    `folder` may be missing. Nothing is opened or verified. Paths for which `is_away` holds are left out.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    found = [(step, name) for name in names if (step := step_of(name)) is not None and not is_away(folder / name)]
    found.sort(key=lambda entry: (-entry[0], entry[1].startswith("."), entry[1]))
    return [(step, folder / name) for step, name in found]


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint lies in, or that one lies in to which it is a link; its own directory where
    it was moved out of a run.
    """
    for path in (Path(os.path.abspath(checkpoint)), checkpoint.resolve()):
        if path.parent.name == FOLDER:
            place = path.parent.parent
            # A run may have the name of a ring itself.
            return place.parent if place.name == RING and (place.parent / RUN_FILE).is_file() else place
    return checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is the directory of a published checkpoint."""
    return (path / MANIFEST_FILE).is_file()


def home_of(path: Path) -> Path:
    """The run directory of `path`, which is one itself or the directory of a checkpoint."""
    return run_of(path) if is_checkpoint(path) else path


def is_away(path: Path) -> bool:
    """Whether `path` leads to a file system that is unmounted or gone. Raises OSError for any other failure."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in _AWAY:
            return True
        raise
    return False


def clear_leftovers(folder: Path, *purposes: str) -> None:
    """Remove what interrupted saves ("saving") or prunings ("deleting") left behind. Raises OSError."""
    for name in os.listdir(folder) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(name)
        if match and match[1] in purposes:
            with suppress(FileNotFoundError):
                _erase(folder / name)


def remove(directory: Path, step: int, renamed: Callable[[], None] = lambda: None) -> None:
    """Delete a checkpoint so that a kill never leaves part of one under a readable name. Raises OSError.

    `renamed` is called between the renaming and the deletion.
    """
    condemned = directory.with_name(temporary_name(step, "deleting"))
    os.rename(directory, condemned)
    sync_directory(directory.parent)
    renamed()
    _erase(condemned)


def set_aside(directory: Path, step: int, why: str = "corrupt") -> Path:
    """Rename a checkpoint to `.corrupt` (`.corrupt-1`, ... when taken), or to the suffix given by `why`. Raises
    OSError.
    """
    base = directory.with_name(f"{step_name(step)}.{why}")
    target, number = base, 0
    while os.path.lexists(target):
        number += 1
        target = base.with_name(f"{base.name}-{number}")
    os.rename(directory, target)
    sync_directory(directory.parent)
    return target


def _erase(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
