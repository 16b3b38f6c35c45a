"""Writes small files atomically: a reader sees the old or the new version, never a part of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kha_train.errors import ConfigError, Options
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, check_regular, read_regular
from kha_train.foreign.typed import Source
from kha_train.record.jsonl import LONE_SURROGATES, decode, encode

T = TypeVar("T")
PICTURE = (b"\x89PNG\r\n\x1a\n", b"<?xml ", b"%PDF-")
"""First bytes of files written by matplotlib: PNG, SVG, PDF."""


def size_of(path: Path) -> int:
    """Size of the file `path` in bytes; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` with `content`, as `write_text` does."""
    write_text(path, json.dumps(encode(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_json`, without waiting for the disk: for data that can be computed again. Raises OSError."""
    beside = path.with_name(f"{path.name}.new")
    # Never write into an existing file with this name: it is not ours.
    beside.unlink(missing_ok=True)
    with beside.open("x", encoding="utf-8", errors=LONE_SURROGATES) as file:
        file.write(json.dumps(encode(content), allow_nan=False) + "\n")
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` with `text` atomically and durably: written beside it, synced, renamed."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8", errors=LONE_SURROGATES) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_directory(path.parent)


def mark_of(command: str, subjects: Iterable[str | Path]) -> str:
    """The mark that `command` writes into its output about `subjects` (paths or URLs). No other file contains it by
    chance.
    """
    places = (str(each) if "://" in str(each) else str(Path(each).resolve()) for each in subjects)
    text = "\n".join(sorted(places)).encode(errors="surrogateescape")
    return f"kha-{command} {hashlib.sha256(text).hexdigest()}"


@contextmanager
def written_as(field: str, place: Path, fix: str) -> Iterator[None]:
    """Around writing to `place`, which the user named with `field`: raises ConfigError, with `fix`, where writing can
    never work (a read-only file system, no permission, a file in the way). A full or failing disk is not such a case.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise
        raise ConfigError(f"cannot be written: {error.strerror}", field=field, value=str(place), fix=fix) from error


def is_made(path: Path, mark: str, heads: tuple[bytes, ...] = PICTURE) -> bool:
    """Whether `path` is a file that begins with one of `heads` and holds `mark`: an earlier output of a command."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content.startswith(heads) and mark.encode() in content


def check_replaceable(
    path: Path, mark: str | None, option: str, overwrite: bool, heads: tuple[bytes, ...] = PICTURE
) -> None:
    """Before overwriting `path`: raises ConfigError unless it is absent, or begins with one of `heads` and holds `mark`
    (made by the same command for the same subjects; None: no file qualifies), or `overwrite` is set. Only regular files
    are ever overwritten. `option` is the command-line option that named the path.
    """
    check_regular(path, ConfigError)
    if overwrite or not os.path.lexists(path):
        return
    if mark is not None and is_made(path, mark, heads):
        return
    raise ConfigError(
        "exists, and was not made by this command from the same input",
        field=option,
        value=str(path),
        fix=Options("--overwrite", f"choose another place with {option}, or pass {{}}"),
    )


def read_json(path: Path, schema: type[T], fix: str = "restore it from a copy, or move it away") -> T | None:
    """The object in `path`, checked against `schema`; None when there is no such file.

    Raises DataError, with `fix`, when it is not JSON or does not match.
    """
    raw = read_regular(path, SMALL)
    if raw is None:
        return None
    source = Source(str(path), fix=fix)
    try:
        found = decode(parse_json(raw))
    except ValueError as error:
        raise source.fault("", f"is damaged: {error}") from error
    return source.read(schema, found)


@contextmanager
def published(place: Path, option: str) -> Iterator[Path]:
    """A hidden directory beside `place` to write into. After the block it becomes `place`, with every file on the disk;
    if the block fails, nothing is left.

    Raises ConfigError, naming `option`, where `place` holds something or can never be written.
    """
    fix = f"name another directory with {option}"
    if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError("exists, and nothing is overwritten", field=option, value=str(place), fix=fix)
    # A link to an empty directory stays, and no rename replaces it.
    target = Path(os.path.realpath(place))
    if target == Path(os.path.realpath(".")) or os.path.ismount(target):
        problem = "is the current directory or a mount point, which no rename can replace"
        raise ConfigError(problem, field=option, value=str(place), fix=f"name a new directory in it with {option}")
    beside = target.with_name(f".{target.name}.writing-{secrets.token_hex(6)}")
    with written_as(option, place, fix):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
    try:
        yield beside
        # Not every writer waited for the disk.
        for written in (*beside.rglob("*"), beside):
            sync_directory(written)
        with written_as(option, place, fix):
            os.rename(beside, target)
            sync_directory(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Makes renames and removals inside the directory `path` durable, or the content of the file `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
