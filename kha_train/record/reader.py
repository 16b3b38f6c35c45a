"""Reading a run directory, alive or finished, without touching it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kha_train.record.files import read_json
from kha_train.record.jsonl import read_lines
from kha_train.record.rewind import DISCARDED_FILE, METRICS_FILE

EVENTS_FILE = "events.jsonl"
RUN_FILE = "run.json"


def _inside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The surviving curve, a dict a step, non-finite values as floats; `path` is the file or its run directory.

    A missing file is an empty list. Raises DataError for a damaged line before the last.
    """
    return read_lines(_inside(path, METRICS_FILE))


def read_discarded(path: Path) -> list[dict[str, Any]]:
    """The lines undone by restarts, each with `discarded_reason` and `discarded_by_attempt`. Raises DataError."""
    return read_lines(_inside(path, DISCARDED_FILE))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the order they happened; `path` is the file or its run directory. Raises DataError."""
    return read_lines(_inside(path, EVENTS_FILE))


def read_run(path: Path) -> dict[str, Any]:
    """`run.json` as a dict; empty when there is none."""
    return read_json(_inside(path, RUN_FILE)) or {}
