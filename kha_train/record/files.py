"""Small files that are either the old or the new version, never half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
"""How a file of matplotlib begins: PNG, SVG, PDF."""


def size_of(path: Path) -> int:
    """Bytes of the file `path`, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` by `content` as `write_text` does."""
    write_text(path, json.dumps(encode(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_json`, without waiting for the disk: for what can be made again. Raises OSError."""
    beside = path.with_name(f"{path.name}.new")
    # Whatever has this name is no file of ours to write into.
    beside.unlink(missing_ok=True)
    with beside.open("x", encoding="utf-8", errors=LONE_SURROGATES) as file:
        file.write(json.dumps(encode(content), allow_nan=False) + "\n")
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` atomically and durably: written beside, synced, renamed."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8", errors=LONE_SURROGATES) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_directory(path.parent)


def mark_of(command: str, subjects: Iterable[str | Path]) -> str:
    """What `command` writes into its answer about `subjects` (paths, or URLs), and nothing else holds by chance."""
    places = (str(each) if "://" in str(each) else str(Path(each).resolve()) for each in subjects)
    text = "\n".join(sorted(places)).encode(errors="surrogateescape")
    return f"kha-{command} {hashlib.sha256(text).hexdigest()}"


@contextmanager
def written_as(field: str, place: Path, fix: str) -> Iterator[None]:
    """Around writing in `place`, which the user named by `field`: raises ConfigError, with `fix`, where that can never
    be (a read-only file system, no permission, a file in the way); a disk that is full or fails is none of these."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise
        raise ConfigError(f"cannot be written: {error.strerror}", field=field, value=str(place), fix=fix) from error


def check_replaceable(
    path: Path, mark: str | None, option: str, overwrite: bool, heads: tuple[bytes, ...] = PICTURE
) -> None:
    """Before `path` is written over: raises ConfigError unless it is absent, a file that begins as one of `heads` and
    holds `mark` (made by the same command, of the same things; None: no file does), or `overwrite`. What is no file is
    never written over. `option` names the path on the command line."""
    check_regular(path, ConfigError)
    if overwrite or not os.path.lexists(path):
        return
    if mark is not None and path.is_file():
        content = path.read_bytes()
        if content.startswith(heads) and mark.encode() in content:
            return
    raise ConfigError(
        "is there already, and is not an earlier answer to this command",
        field=option,
        value=str(path),
        fix=Options("--overwrite", f"name another place with {option}, or pass {{}}"),
    )


def read_json(path: Path, schema: type[T], fix: str = "restore it from a copy, or move it away") -> T | None:
    """The object in `path` as `schema` says, or None when there is no such file.

    Raises DataError, with `fix`, when it is not JSON or not that object.
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


def sync_directory(path: Path) -> None:
    """Makes renames and removals inside the directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
