"""Finds the rows that W&B lacks when a killed attempt is restarted.

A row is any line ever recorded, numbered from 1 in the order of recording; the mirror sends this number as W&B's own
count. Files are read from their ends, so the time does not grow with the run. The last blocks of an offline attempt's
file show what it holds (LevelDB's log format, private to wandb). If they cannot be read, the note of the last orderly
end counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kha_train.errors import DataError
from kha_train.record.end import read_end
from kha_train.record.files import write_json
from kha_train.record.jsonl import parse
from kha_train.record.reader import DISCARDED_FILE, EVENTS_FILE, METRICS_FILE
from kha_train.record.totals import known_totals

NOTE_FILE = "mirrored.json"
MAX_ROWS = 50_000
"""The newest rows sent again, at most; older ones are only in the record."""
NOT_MIRRORED = (
    "attempt_started", "attempt_ended", "lines_discarded", "lines_missing", "torn_line_removed", "weights_inherited",
    "checkpoint_refused", "attention_backend_changed", "learning_rate_changed", "branched", "zclip",
)  # fmt: skip
"""Kinds of events that are not marked in W&B."""
_HEAD = re.compile(rb'"attempt": (\d+), "time": ([\d.e+]+)')
_PIECE = 1 << 20
_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4
_BLOCKS_AT_ONCE, _BLOCKS_BACK = 8, 256

Row = tuple[int, dict[str, Any], list[dict[str, Any]]]
"""A row's number, its line, and the events of its step."""


def rows_recorded(run_dir: Path) -> int:
    """How many lines the run has ever recorded, including undone ones. For a long record of an older release they are
    counted.
    """
    with suppress(DataError):
        totals = known_totals(run_dir)
        if totals is not None:
            return totals.lines + totals.undone
    return sum(_count_lines(run_dir / name) for name in (METRICS_FILE, DISCARDED_FILE))


def rows_noted(run_dir: Path) -> int:
    """How many rows the last attempt that ended in good order had sent; 0 without a readable note."""
    path = run_dir / "wandb" / NOTE_FILE
    rows = (parse(path.read_bytes()) or {}).get("rows") if path.is_file() else 0
    return rows if isinstance(rows, int) else 0


def note_rows(run_dir: Path, rows: int) -> None:
    """Note that W&B holds `rows` rows. Raises OSError."""
    (run_dir / "wandb").mkdir(exist_ok=True)
    write_json(run_dir / "wandb" / NOTE_FILE, {"rows": rows})


def rows_in_files(run_dir: Path, wandb_id: str, row_of: Callable[[bytes], int | None]) -> int:
    """The highest row in the files of offline attempts; `row_of` reads it from a record, None for other records."""
    paths = run_dir.glob(f"wandb/offline-run-*-{wandb_id}/run-{wandb_id}.wandb")
    return max((_last_row(path, row_of) for path in paths), default=0)


def missing_rows(run_dir: Path, held: int, total: int) -> Iterator[Row]:
    """The rows above `held` of the `total` recorded, oldest first, from the files as they are now; damaged lines are
    left out. Lines are parsed on demand.
    """
    count = min(total - held, MAX_ROWS)
    if count <= 0:
        return iter(())
    lines, undone = _last_lines(run_dir / METRICS_FILE, count), _last_lines(run_dir / DISCARDED_FILE, total)
    if undone:
        lines = sorted([*lines, *undone], key=_when)[-count:]
    since = _when(lines[0])[1] if lines else 0.0
    events = [event for event in _events_since(run_dir / EVENTS_FILE, since) if event.get("kind") not in NOT_MIRRORED]
    return _with_events(lines, events, total - len(lines) + 1)


def _when(line: bytes) -> tuple[int, float]:
    """The attempt and the time of a metrics line, which are at its beginning."""
    found = _HEAD.search(line)
    return (int(found[1]), float(found[2])) if found else (0, 0.0)


def _events_since(path: Path, since: float) -> list[dict[str, Any]]:
    count = 64
    events: list[dict[str, Any]] = []
    while not events or (len(events) == count // 8 and events[0].get("time", 0.0) >= since):
        events, count = [event for event in map(parse, _last_lines(path, count)) if event is not None], 8 * count
        if not events:
            break
    return [event for event in events if event.get("time", 0.0) >= since]


def _with_events(lines: list[bytes], events: list[dict[str, Any]], first_row: int) -> Iterator[Row]:
    """An event belongs to the last line recorded before it."""
    at = 0
    for index, text in enumerate(lines):
        until = _when(lines[index + 1])[1] if index + 1 < len(lines) else float("inf")
        start = at
        while at < len(events) and events[at].get("time", 0.0) < until:
            at += 1
        line = parse(text)
        if line is not None:
            yield first_row + index, line, events[start:at]


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(_PIECE), b""))


def _last_lines(path: Path, count: int) -> list[bytes]:
    """The last `count` lines that are ended."""
    return read_end(path, count)[1].split(b"\n")[:-1][-count:] if count > 0 else []


def _last_row(path: Path, row_of: Callable[[bytes], int | None]) -> int:
    """The row of the last complete history record in a `.wandb` file; 0 where there is none."""
    size = path.stat().st_size
    last_block = max(0, size - 1) // _BLOCK
    with path.open("rb") as file:
        for block in range(last_block, max(-1, last_block - _BLOCKS_BACK), -1):
            file.seek(block * _BLOCK)
            for record in reversed(_records(file.read(_BLOCKS_AT_ONCE * _BLOCK), block == 0)):
                row = row_of(record)
                if row is not None:
                    return row
    return 0


def _records(data: bytes, from_start: bool) -> list[bytes]:
    """The complete records that begin in `data`, which starts at a block."""
    at, part, inside, records = _HEADER if from_start else 0, b"", False, []
    while at + _CHUNK_HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < _CHUNK_HEADER or kind == 0:
            at += left
            continue
        piece = data[at + _CHUNK_HEADER : at + _CHUNK_HEADER + length]
        at += _CHUNK_HEADER + length
        if len(piece) < length:
            break
        if kind in (_WHOLE, _FIRST):
            part, inside = b"", True
        part += piece
        if inside and kind in (_WHOLE, _LAST):
            records.append(part)
            inside = False
    return records
