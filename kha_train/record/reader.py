"""Reading a run directory, alive or finished, without touching it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kha_train.foreign.typed import Source
from kha_train.record.files import read_json
from kha_train.record.jsonl import read_lines
from kha_train.record.rewind import DISCARDED_FILE, METRICS_FILE
from kha_train.record.schema import RUN_FORMAT, RunFile, check_discarded, check_events, check_metrics

EVENTS_FILE = "events.jsonl"
RUN_FILE = "run.json"


def _inside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The surviving curve, a dict a step, non-finite values as floats; `path` is the file or its run directory.

    A missing file is an empty list. Raises DataError for a damaged line before the last, one without a step, steps that
    do not increase, and a metric that is no number.
    """
    file = _inside(path, METRICS_FILE)
    lines = read_lines(file)
    check_metrics(lines, str(file))
    return lines


def read_discarded(path: Path) -> list[dict[str, Any]]:
    """The lines undone by restarts, each with `discarded_reason` and `discarded_by_attempt`. Raises DataError."""
    file = _inside(path, DISCARDED_FILE)
    return check_discarded(read_lines(file), str(file))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the order they happened; `path` is the file or its run directory. Raises DataError."""
    file = _inside(path, EVENTS_FILE)
    return check_events(read_lines(file), str(file))


def read_run(path: Path, schema: type[RunFile] = RunFile) -> dict[str, Any]:
    """`run.json` as a dict; empty when there is none. Raises DataError when it is damaged or of a later format."""
    file = _inside(path, RUN_FILE)
    found = read_json(file, schema, "restore it, or choose another run.dir")
    if found is not None and found["format"] > RUN_FORMAT:
        source = Source(str(file), fix="use the version that wrote it")
        raise source.fault("format", "is of a later version", found["format"], f"up to {RUN_FORMAT}")
    return dict(found) if found is not None else {}
