"""A cache of a long record's columns beside the record (its twin), so that its lines are parsed once.

The twin holds a checksum of every block of the record. While size, times and inode of the record are unchanged, the
twin is used as it is. Otherwise the blocks are compared, which is much cheaper than parsing them: matching blocks are
kept and the rest is parsed. So the columns stay right when the record has grown, was rewound or was edited.

A twin is a checked header and plain numbers. A damaged or foreign twin is ignored, and no twin is written into a
read-only directory.
"""

# C columns  N lines of the record

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, TypedDict

import numpy as np

from kha_train.errors import DataError
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import open_regular
from kha_train.foreign.typed import LARGEST, Count, Length, Match, Source, is_number
from kha_train.record.columns import COLUMNS, Columns, columns_of, joined
from kha_train.record.jsonl import objects, parse, whole_blocks
from kha_train.record.reader import METRICS_FILE
from kha_train.record.schema import COUNTS, WHOLE, check_metrics

TWIN_FILE = ".metrics.columns"
FORMAT = 1
BLOCK = 4 * 2**20
"""Bytes of the record per checksum."""
WORTH = BLOCK
"""Shorter records are read without a twin."""
_KINDS = ("<f8", "u1", "<i8")
_LONGEST_HEAD = 2**24
_LEFT_OVER_SECONDS = 3600
_TRIED = 32
"""Number of lines read again to check that the twin belongs to this record."""


class Block(NamedTuple):
    """Lines of the record up to byte `end`, which is row `rows`; `digest` is the SHA-256 of this block alone."""

    end: int
    rows: int
    digest: str


class Head(TypedDict):
    """The first line of a twin, followed by the columns, their presence, and the offsets of the lines."""

    format: int
    columns: list[str]
    stamp: Annotated[list[int], Length(5)]
    blocks: list[tuple[Count, Count, Annotated[str, Match("[0-9a-f]{64}")]]]
    body: Annotated[str, Match("[0-9a-f]{64}")]


@dataclass(frozen=True)
class Twin:
    """Columns and the blocks they were made from; `stamp` identifies the state of the record then."""

    stamp: list[int]
    blocks: list[Block]
    columns: Columns


NONE = Twin([], [], columns_of([]))
"""Stands for a missing twin."""


def read_columns(path: Path) -> Columns:
    """The columns of the surviving curve of the run directory `path`; without lines where it has no record.

    Uses the twin of a long record, and creates or updates it if possible. Raises DataError as `read_metrics`.
    """
    file, beside = path / METRICS_FILE, path / TWIN_FILE
    with open_regular(file) as record:
        if record is None:
            return columns_of([])
        stamp = _stamp(record)
        twin = load_twin(beside, stamp[0]) if stamp[0] >= WORTH else None
        kept = twin if twin and twin.stamp == stamp else _agreeing(twin, record, stamp[0])
        if not _is_of(kept.columns, record):
            kept = NONE
        if kept.stamp == stamp:
            return kept.columns
        found = _continued(file, record, kept, stamp)
    if stamp[0] >= WORTH:
        save_twin(beside, found, like=file)
    return found.columns


def load_twin(path: Path, size: int) -> Twin | None:
    """The twin in `path` for a record of `size` bytes; None where there is no intact one."""
    try:
        with open_regular(path) as file:
            return None if file is None else _loaded(file, str(path), size)
    except (DataError, OSError, ValueError):
        return None


def save_twin(path: Path, twin: Twin, like: Path) -> None:
    """Replaces `path` atomically, with the permissions of the file `like`. Does nothing in a directory that cannot be
    written.
    """
    body = (twin.columns.values_CN, twin.columns.present_CN, twin.columns.offsets_N1)
    parts = [np.ascontiguousarray(part, kind).reshape(-1).data for part, kind in zip(body, _KINDS, strict=True)]
    head: Head = {
        "format": FORMAT,
        "columns": list(COLUMNS),
        "stamp": twin.stamp,
        "blocks": [(block.end, block.rows, block.digest) for block in twin.blocks],
        "body": _digest(parts),
    }
    beside = path.with_name(f"{TWIN_FILE}.{secrets.token_hex(8)}.new")
    try:
        with suppress(OSError):
            _remove_left_over(path.parent)
            with beside.open("xb") as file:
                os.fchmod(file.fileno(), like.stat().st_mode & 0o666)
                file.write(json.dumps(head).encode() + b"\n")
                for part in parts:
                    file.write(part)
            os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _remove_left_over(folder: Path) -> None:
    """Remove temporary files older than an hour: writing is faster, so their process was killed."""
    for path in folder.glob(f"{TWIN_FILE}.{'[0-9a-f]' * 16}.new"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _LEFT_OVER_SECONDS:
                path.unlink()


def _continued(file: Path, record: BinaryIO, kept: Twin, stamp: list[int]) -> Twin:
    """The twin of the whole record, of which the part `kept` agrees. Raises DataError as `read_metrics`."""
    blocks, parts = list(kept.blocks), [kept.columns]
    rows, before = len(kept.columns), int(kept.columns["step"][-1]) if len(kept.columns) else 0
    for start, content in whole_blocks(record, blocks[-1].end if blocks else 0, BLOCK):
        lines = objects(file, content, rows + 1)
        check_metrics(lines, str(file), rows + 1, before)
        rows, before = rows + len(lines), lines[-1]["step"]
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + start + 1
        parts.append(columns_of(lines, np.concatenate([[start], ends])))
        blocks.append(Block(start + len(content), rows, _digest([content])))
    return Twin(stamp, blocks, joined(parts))


def _agreeing(twin: Twin | None, record: BinaryIO, size: int) -> Twin:
    """The part of `twin` whose blocks still match the record. A short last block is parsed again; otherwise a growing
    record would collect many of them.
    """
    blocks: list[Block] = []
    record.seek(0)
    for block in twin.blocks if twin else ():
        length = block.end - (blocks[-1].end if blocks else 0)
        if length < BLOCK // 2 or block.end > size or _digest([record.read(length)]) != block.digest:
            break
        blocks.append(block)
    if twin is None or not blocks:
        return NONE
    rows, columns = blocks[-1].rows, twin.columns
    kept = Columns(columns.values_CN[:, :rows], columns.present_CN[:, :rows], columns.offsets_N1[: rows + 1])
    return Twin([], blocks, kept)


def _is_of(columns: Columns, record: BinaryIO) -> bool:
    """Whether some lines of the record, including the one with the highest loss, agree with `columns`."""
    count, losses = len(columns), columns["train/loss"]
    some = {0, count - 1, *(secrets.randbelow(count) for _ in range(_TRIED))} if count else set()
    some |= {int(np.nanargmax(losses))} if np.isfinite(losses).any() else set()
    for row in sorted(some):
        begin, end = (int(offset) for offset in columns.offsets_N1[row : row + 2])
        record.seek(begin)
        line = parse(record.read(end - begin))
        if line is None or any(_differs(line.get(name), columns, name, row) for name in COLUMNS):
            return False
    return True


def _differs(value: Any, columns: Columns, name: str, row: int) -> bool:
    if value is None or not columns.has(name)[row]:
        return (value is not None) != bool(columns.has(name)[row])
    # The twin holds only numbers; the record behind a forged twin may hold anything.
    return not is_number(value) or not np.array_equal(columns[name][row], value, equal_nan=True)


def _loaded(file: BinaryIO, path: str, size: int) -> Twin | None:
    """Raises ValueError or DataError for anything that is not a twin of this release."""
    first = file.readline(_LONGEST_HEAD)
    head = Source(path).read(Head, parse_json(first))
    blocks = [Block(*block) for block in head["blocks"]]
    rows = blocks[-1].rows if blocks else 0
    sizes = [8 * rows * len(COLUMNS), rows * len(COLUMNS), 8 * (rows + 1)]
    if head["format"] != FORMAT or head["columns"] != list(COLUMNS) or not 0 < rows <= size:
        return None
    if os.fstat(file.fileno()).st_size != len(first) + sum(sizes):
        return None
    body = [file.read(size) for size in sizes]
    if _digest(body) != head["body"]:
        return None
    values, present, offsets = (np.frombuffer(part, kind) for part, kind in zip(body, _KINDS, strict=True))
    if not (present <= 1).all():
        return None
    columns = Columns(values.reshape(-1, rows), present.astype(bool).reshape(-1, rows), offsets)
    return Twin(head["stamp"], blocks, columns) if _is_sound(columns, blocks) else None


def _is_sound(columns: Columns, blocks: list[Block]) -> bool:
    """Whether the numbers could come from a checked record."""
    values, present, offsets = columns.values_CN, columns.present_CN, columns.offsets_N1
    ends, rows = [block.end for block in blocks], [block.rows for block in blocks]
    if not (_rises([0, *ends]) and _rises([0, *rows]) and offsets[0] == 0 and _rises(offsets)):
        return False
    counted = [name in COUNTS for name in COLUMNS]
    counts = values[counted][present[counted]]
    return bool(
        offsets[rows].tolist() == ends
        and np.isnan(values[~present]).all()
        and columns.has("step").all()
        and columns["step"][0] >= 1
        and _rises(columns["step"])
        and (np.abs(counts) <= LARGEST).all()
        and all(_are_whole(columns[name][columns.has(name)]) for name in WHOLE)
    )


def _rises(values: Any) -> bool:
    return bool((np.diff(values) > 0).all())


def _are_whole(values: np.ndarray) -> bool:
    return bool((np.trunc(values) == values).all())


def _stamp(record: BinaryIO) -> list[int]:
    """A value that changes whenever the file is written to or replaced."""
    found = os.fstat(record.fileno())
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()
