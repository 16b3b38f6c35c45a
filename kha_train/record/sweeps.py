"""Reads `sweep.json`: the points of a sweep and the jobs they were submitted in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

from kha_train.foreign.typed import Absent, Count, Match, Range, Source
from kha_train.record.files import read_json

SWEEP_FILE = "sweep.json"
FORMAT = 1


class PointEntry(TypedDict):
    """A point in `sweep.json` and in the file of a job array. `run_dir` is a valid path."""

    label: str
    run_dir: Annotated[str, Match(r"[^\0\ud800-\udc7f\udd00-\udfff]*")]
    overrides: list[str]
    steps: Count
    tokens: Annotated[int, Range(0, 2**63)]
    flops: float


class Submission(TypedDict):
    """A job array: the labels of its elements, in order."""

    job: str
    labels: list[str]


class SweepFile(TypedDict):
    """`sweep.json`."""

    format: Annotated[int, Absent(1)]
    points: list[PointEntry]
    submissions: Annotated[list[Submission], Absent([])]


def load_sweep(directory: Path) -> dict[str, Any] | None:
    """The content of `sweep.json`; None when `directory` is no sweep. Raises DataError when it is damaged or of a later
    format."""
    found = read_json(directory / SWEEP_FILE, SweepFile)
    if found is not None and found["format"] > FORMAT:
        source = Source(str(directory / SWEEP_FILE), fix="use the version that wrote it")
        raise source.fault("format", "was written by a later version", found["format"], f"up to {FORMAT}")
    return None if found is None else dict(found)
