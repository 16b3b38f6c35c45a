"""Finds the rank that failed first, from the files that the ranks of a failed attempt left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kha_train.errors import DataError
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, read_regular
from kha_train.foreign.typed import Source
from kha_train.record.blame import blame
from kha_train.record.reader import read_run
from kha_train.record.schema import Failure

FAILURES = "errors"
"""The folder of fatal errors; created by the first rank that fails."""
HANG = "hang"
"""The folder of stacks and alarms; created by the first rank that hangs."""
RANKS = ".ranks"
"""The folder of per-rank files of every attempt: the watchdogs' beats, and `LIFE_FILE`. Earlier releases had the beats
in `HANG` and `LIFE_FILE` in `FAILURES`.
"""
LIFE_FILE = "life"
"""Holds the name of the attempt that may write failures, and its number of ranks."""


def first_failure(run_dir: Path, *, ended: bool = False) -> dict[str, Any] | None:
    """The first failure of the last attempt: rank, time, error, traceback. None when nothing has failed.

    A rank without a file is named if others lost their connection to it, or if no rank left a file and all are known to
    have `ended`.

    Raises DataError when a file holds JSON that is not a failure.
    """
    found = []
    for path in (run_dir / FAILURES).glob("rank-*.json"):
        try:
            content = parse_json(read_regular(path, SMALL) or b"")
        except (OSError, ValueError):
            # The rank was killed while writing it, or the disk was full.
            continue
        found.append(Source(str(path), fix="remove it").read(Failure, content))
    life, ranks = _start(run_dir)
    return blame(found, ranks, _last_seen(run_dir, life), ended=ended)


def first_failure_line(run_dir: Path, *, ended: bool = False) -> str:
    """The first failure in one line for people; "" without any. Raises DataError as `first_failure`."""
    failure = first_failure(run_dir, ended=ended)
    return f"rank {failure['rank']} failed first: {failure['error']}" if failure else ""


def _start(run_dir: Path) -> tuple[str, int]:
    """The name of the last attempt and its number of ranks; "" and 0 where unknown."""
    with suppress(OSError, DataError):
        places = (run_dir / folder / LIFE_FILE for folder in (RANKS, FAILURES))
        content = next((found for place in places if (found := read_regular(place, SMALL)) is not None), None)
        if content is None:
            return "", 0
        life, _, ranks = content.decode(errors="replace").partition(" ")
        if re.fullmatch(r"[1-9][0-9]{0,6}", ranks):
            return life, int(ranks)
        attempts = read_run(run_dir).get("attempts") or [{}]
        return life, attempts[-1].get("world_size", 0)
    return "", 0


def _last_seen(run_dir: Path, life: str) -> dict[int, float]:
    """When each rank of the attempt `life` last wrote its heartbeat, by the clock of the file system."""
    return dict([*_beats(run_dir / HANG, life), *_beats(run_dir / RANKS, life)])


def _beats(folder: Path, life: str) -> Iterator[tuple[int, float]]:
    for path in folder.glob("rank-*.json"):
        # A torn or foreign file is not a heartbeat.
        with suppress(OSError, ValueError, DataError):
            beat = parse_json(read_regular(path, SMALL) or b"")
            if isinstance(beat, dict) and beat.get("life") == life:
                yield int(path.stem.removeprefix("rank-")), path.stat().st_mtime
