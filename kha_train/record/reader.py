"""Reads a run directory, live or finished, without changing it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from kha_train.foreign.typed import Source
from kha_train.record.files import read_json
from kha_train.record.jsonl import read_lines
from kha_train.record.schema import RUN_FORMAT, RunFile, check_discarded, check_events, check_metrics
from kha_train.record.tail import line_at, read_tail

METRICS_FILE = "metrics.jsonl"
DISCARDED_FILE = "metrics.discarded.jsonl"
EVENTS_FILE = "events.jsonl"
RUN_FILE = "run.json"


def _inside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The surviving curve, a dict per step, with non-finite values as floats; `path` is the file or its run directory.

    A missing file is an empty list. Raises DataError for a damaged line before the last, a line without a step, steps
    that do not increase, and a metric that is not a number.
    """
    file = _inside(path, METRICS_FILE)
    lines = read_lines(file)
    check_metrics(lines, str(file))
    return lines


def read_last_metrics(path: Path, count: int = 1) -> list[dict[str, Any]]:
    """The last `count` lines of the surviving curve, or all if there are fewer, read from the end of the file.

    Raises DataError as `read_metrics`, but only for the lines read: damage before them is not seen.
    """
    tail = read_tail(_inside(path, METRICS_FILE), count)
    lines = tail.lines()
    tail.numbered(lambda first: check_metrics(lines, str(tail.path), first))
    return lines[-count:]


def read_metrics_after(path: Path, step: int) -> tuple[int, list[dict[str, Any]]]:
    """(byte offset of the first line, lines) of the surviving curve after `step`, read from the end of the file.
    Without such lines the offset is the end of the complete lines. Raises as `read_last_metrics`.
    """
    file, count = _inside(path, METRICS_FILE), 1
    while True:
        tail = read_tail(file, count)
        lines = tail.lines()
        tail.numbered(partial(check_metrics, lines, str(tail.path)))
        if tail.start == 0 or lines[0]["step"] <= step:
            break
        count = 4 * len(lines)
    kept = sum(line["step"] <= step for line in lines)
    rest = tail.content[: tail.whole].split(b"\n", kept)[-1]
    return tail.start + tail.whole - len(rest), lines[kept:]


def read_metrics_at(path: Path, step: int) -> dict[str, Any] | None:
    """The line of `step` of the surviving curve, found by bisection; None where there is none. Raises DataError for a
    damaged line on the way.
    """
    file = _inside(path, METRICS_FILE)
    line = line_at(file, step)
    if line is not None:
        check_metrics([line], str(file))
    return line


def read_discarded(path: Path) -> list[dict[str, Any]]:
    """The lines undone by restarts, each with `discarded_reason` and `discarded_by_attempt`. Raises DataError."""
    file = _inside(path, DISCARDED_FILE)
    return check_discarded(read_lines(file), str(file))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in chronological order; `path` is the file or its run directory. Raises DataError."""
    file = _inside(path, EVENTS_FILE)
    return check_events(read_lines(file), str(file))


def read_run(path: Path, schema: type[RunFile] = RunFile) -> dict[str, Any]:
    """`run.json` as a dict; empty when there is none. Raises DataError when it is damaged or of a later format."""
    file = _inside(path, RUN_FILE)
    found = read_json(file, schema, "restore it, or choose another run.dir")
    if found is not None and found["format"] > RUN_FORMAT:
        source = Source(str(file), fix="use the version that wrote it")
        raise source.fault("format", "was written by a later version", found["format"], f"up to {RUN_FORMAT}")
    return dict(found) if found is not None else {}
