"""Small files that are either the old or the new version, never half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kha_train.errors import DataError
from kha_train.record.jsonl import decode, encode


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` by `content` as `write_text` does."""
    write_text(path, json.dumps(encode(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` atomically and durably: written beside, synced, renamed."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None when there is no such file. Raises DataError when it is not JSON."""
    if not path.exists():
        return None
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"is damaged: {error}", field=str(path), fix="restore it, or choose another run.dir") from error


def sync_directory(path: Path) -> None:
    """Makes renames and removals inside the directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
