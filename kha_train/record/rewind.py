"""Moving the undone end of the curve from `metrics.jsonl` to `metrics.discarded.jsonl` so that no crash loses or
doubles a line.

Two files cannot change in one atomic step, so the intent is written down first (`.metrics.rewind.json`: where to cut
the one file, how long the other was). Whoever finds the intent finishes the work; every step may be repeated.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from kha_train.record.files import read_json, sync_directory, write_json
from kha_train.record.jsonl import to_line, whole_lines

METRICS_FILE = "metrics.jsonl"
DISCARDED_FILE = "metrics.discarded.jsonl"
INTENT_FILE = ".metrics.rewind.json"


def plan_rewind(run_dir: Path, step: int, **note: Any) -> dict[str, Any] | None:
    """Writes down the intent to discard every line after `step`; None, and nothing written, when there is none.

    `note` (reason, the attempt that discards) is added to every discarded line. The files must have been repaired.
    """
    metrics, discarded = run_dir / METRICS_FILE, run_dir / DISCARDED_FILE
    undone = [offset for offset, line in whole_lines(metrics) if line["step"] > step]
    if not undone:
        return None
    discarded_size = discarded.stat().st_size if discarded.exists() else 0
    sizes = {"metrics_size": undone[0], "discarded_size": discarded_size}
    intent = {"id": uuid.uuid4().hex, "step": step, "lines": len(undone), **sizes, "note": note}
    write_json(run_dir / INTENT_FILE, intent)
    return intent


def pending_rewind(run_dir: Path) -> dict[str, Any] | None:
    """The intent a dead process left behind, if any."""
    return read_json(run_dir / INTENT_FILE)


def finish_rewind(run_dir: Path, intent: dict[str, Any]) -> None:
    """Carries out an intent; safe to repeat after a crash anywhere inside it. The intent file stays."""
    metrics, discarded = run_dir / METRICS_FILE, run_dir / DISCARDED_FILE
    if metrics.stat().st_size > intent["metrics_size"]:
        undone = [line for offset, line in whole_lines(metrics) if offset >= intent["metrics_size"]]
        with discarded.open("ab") as file:
            file.truncate(intent["discarded_size"])
            file.write(b"".join(to_line({**line, **intent["note"]}) for line in undone))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(run_dir)
        os.truncate(metrics, intent["metrics_size"])
    _sync(metrics)


def forget_rewind(run_dir: Path) -> None:
    """Removes the intent, the last act of a rewind."""
    (run_dir / INTENT_FILE).unlink(missing_ok=True)
    sync_directory(run_dir)


def _sync(path: Path) -> None:
    with path.open("ab") as file:
        os.fsync(file.fileno())
