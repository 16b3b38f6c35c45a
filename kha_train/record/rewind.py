"""Moves the undone end of the curve from `metrics.jsonl` to `metrics.discarded.jsonl`; a crash neither loses nor
doubles a line.

Two files cannot change in one atomic step, so the intent is written first (`.metrics.rewind.json`: where to cut the one
file, and how long the other was). Any process that finds the intent finishes the work; every step may be repeated.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from kha_train.foreign.files import open_regular
from kha_train.foreign.typed import Source
from kha_train.record.files import read_json, sync_directory, write_json
from kha_train.record.jsonl import parse, to_line
from kha_train.record.reader import DISCARDED_FILE, METRICS_FILE, read_metrics_after
from kha_train.record.schema import Rewind

INTENT_FILE = ".metrics.rewind.json"


def plan_rewind(run_dir: Path, step: int, **note: Any) -> dict[str, Any] | None:
    """Writes the intent to discard every line after `step`. Returns None, and writes nothing, when there is no such
    line.

    `note` (the reason, and the attempt that discards) is added to every discarded line. The files must have been
    repaired.
    """
    metrics, discarded = run_dir / METRICS_FILE, run_dir / DISCARDED_FILE
    offset, undone = read_metrics_after(metrics, step)
    if not undone:
        return None
    discarded_size = discarded.stat().st_size if discarded.exists() else 0
    sizes = {"metrics_size": offset, "discarded_size": discarded_size}
    intent = {"id": uuid.uuid4().hex, "step": step, "lines": len(undone), **sizes, "note": note}
    write_json(run_dir / INTENT_FILE, intent)
    return intent


def pending_rewind(run_dir: Path) -> dict[str, Any] | None:
    """The intent that a dead process left behind, if any. Raises DataError when it is malformed."""
    found = read_json(run_dir / INTENT_FILE, Rewind, "inspect both files, then remove it")
    return None if found is None else dict(found)


def finish_rewind(run_dir: Path, intent: dict[str, Any]) -> list[dict[str, Any]]:
    """Carries out an intent; may be repeated after a crash at any point. The intent file stays. Returns the lines that
    were moved now. Reads only what the intent covers.

    Raises DataError, and changes nothing, when the intent does not fit these two files.
    """
    metrics, discarded = run_dir / METRICS_FILE, run_dir / DISCARDED_FILE
    lines: list[dict[str, Any]] = []
    if metrics.stat().st_size > intent["metrics_size"]:
        first, lines = read_metrics_after(metrics, intent["step"])
        undone = [to_line({**line, **intent["note"]}) for line in lines]
        _check_fits(run_dir, intent, first if lines else None, undone)
        with discarded.open("ab") as file:
            file.truncate(intent["discarded_size"])
            file.write(b"".join(undone))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(run_dir)
        os.truncate(metrics, intent["metrics_size"])
    _sync(metrics)
    return lines


def forget_rewind(run_dir: Path) -> None:
    """Removes the intent, as the last step of a rewind."""
    (run_dir / INTENT_FILE).unlink(missing_ok=True)
    sync_directory(run_dir)


def _sync(path: Path) -> None:
    with path.open("ab") as file:
        os.fsync(file.fileno())


def _check_fits(run_dir: Path, intent: dict[str, Any], first: int | None, undone: list[bytes]) -> None:
    """Raises DataError unless the intent cuts exactly the lines after its step (`first` begins there), and unless the
    other file holds beyond its recorded length only what this rewind has added.
    """
    source = Source(str(run_dir / INTENT_FILE), fix="inspect both files, then remove it")
    if first != intent["metrics_size"] or len(undone) != intent["lines"]:
        allowed = f"the start of the lines after step {intent['step']}, {first}"
        raise source.fault("metrics_size", f"does not fit {METRICS_FILE}", intent["metrics_size"], allowed)
    size = intent["discarded_size"]
    length, before, written = _written(run_dir / DISCARDED_FILE, size)
    began_here = {line.rstrip(b"\n") for line in undone}
    foreign = [line for line in written.split(b"\n") if parse(line) is not None and line not in began_here]
    if size > length or before not in (b"", b"\n") or foreign:
        allowed = "the end of its lines before the rewind"
        raise source.fault("discarded_size", f"does not fit {DISCARDED_FILE}", size, allowed)


def _written(path: Path, size: int) -> tuple[int, bytes, bytes]:
    """(length of the file, the byte before `size`, what follows `size`)."""
    with open_regular(path) as file:
        if file is None:
            return 0, b"", b""
        length = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return length, file.read(min(size, 1)), file.read()
