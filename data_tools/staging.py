"""Replaces a dataset completely or not at all: it is written beside its place and moved there when it is complete.

`.NAMES.writing-IDENTITY` beside the datasets holds unfinished output. Each identity (text, tokenizer, plan) has its own
directory. Files of the user's own in a dataset's directory are kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kha_train.data.format.manifest import MANIFEST_NAME
from kha_train.data.tokenizer_kinds import FILE_NAMES
from kha_train.errors import ConfigError, Options

_OURS = ("shard-*.tok", "shard-*.doc", "shard-*.crc", "shard-*.done", MANIFEST_NAME, *FILE_NAMES)


@contextmanager
def replaced(places: Mapping[str, Path], identity: str, *, overwrite: bool, keep: bool) -> Iterator[dict[str, Path]]:
    """Directories to write the datasets of `places` in, beside each other. On success they are moved into place. On
    failure they remain, with `keep`, for the next call with the same `identity`.

    Raises ConfigError when another process writes there, when the directory cannot be written and, unless `overwrite`,
    when shards exist.
    """
    home = next(iter(places.values())).parent
    names = "-".join(place.name for place in places.values())
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / f".{names}.lock").open("ab")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", field="output directory", value=str(home)) from error
    with lock:
        _take(lock.fileno(), Path(lock.name))
        root = home / f".{names}.writing-{identity[:16]}"
        finished = False
        try:
            for place in places.values():
                refuse_existing(place, overwrite=overwrite)
            yield {name: root / place.name for name, place in places.items()}
            for place in places.values():
                _put(root / place.name, place)
            finished = True
        finally:
            if finished:
                for left in home.glob(f".{names}.writing-*"):
                    shutil.rmtree(left, ignore_errors=True)
            elif not keep:
                shutil.rmtree(root, ignore_errors=True)
            (home / f".{names}.lock").unlink(missing_ok=True)


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Raises ConfigError when `directory` is not a directory, or holds shards and `overwrite` is not set."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError("is not a directory", field="output directory", value=str(directory))
    if overwrite or not (list(directory.glob("shard-*.tok")) or (directory / MANIFEST_NAME).exists()):
        return
    what = "a dataset" if (directory / MANIFEST_NAME).exists() else f"shards, though no {MANIFEST_NAME}"
    raise ConfigError(
        f"already holds {what}", field="output directory", value=str(directory), fix=Options("--overwrite", "pass {}")
    )


def _take(descriptor: int, path: Path) -> None:
    """Take the lock, which the system releases when this process ends. Raises ConfigError when another process holds
    it.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder may have deleted the file since it was opened here; a third process would then lock
        # another file.
        taken = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        taken = False
    if not taken:
        raise ConfigError(
            "another process is writing there", field="output directory", value=str(path.parent), fix="wait for it"
        )


def _put(made: Path, place: Path) -> None:
    """Move the directory `made` to `place`, replacing what is there except the user's own files."""
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        ours = {path.name for pattern in _OURS for path in place.glob(pattern)}
        for path in place.iterdir():
            if path.name not in ours:
                os.rename(path, made / path.name)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(place, old)
    os.rename(made, place)
    shutil.rmtree(old, ignore_errors=True)
