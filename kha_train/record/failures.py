"""Which rank failed first: read from the files that the ranks of a failed start left."""

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
"""The folder of what ranks died of; made by the first that does."""
HANG = "hang"
"""The folder of stacks and alarms; made by the first rank that hangs."""
RANKS = ".ranks"
"""The folder of what every start writes of its ranks: the watchdogs' beats, and `LIFE_FILE`. Earlier releases had beats
in `HANG` and the other in `FAILURES`."""
LIFE_FILE = "life"
"""The name of the start that may write failures, and how many ranks it has."""


def first_failure(run_dir: Path, *, ended: bool = False) -> dict[str, Any] | None:
    """The failure of the last start that began it all: rank, time, error, traceback. None where nothing has failed.

    A rank that left nothing is named where others lost their connection to it, and also where none left anything once
    all are known to have `ended`.

    Raises DataError when a file is JSON, but no failure.
    """
    found = []
    for path in (run_dir / FAILURES).glob("rank-*.json"):
        try:
            content = parse_json(read_regular(path, SMALL) or b"")
        except (OSError, ValueError):
            # Its rank was killed while it wrote, or the disk was full.
            continue
        found.append(Source(str(path), fix="remove it").read(Failure, content))
    life, ranks = _start(run_dir)
    return blame(found, ranks, _last_seen(run_dir, life), ended=ended)


def first_failure_line(run_dir: Path, *, ended: bool = False) -> str:
    """The failure that began it all in one line for people; "" without any. Raises DataError as `first_failure`."""
    failure = first_failure(run_dir, ended=ended)
    return f"rank {failure['rank']} failed first: {failure['error']}" if failure else ""


def _start(run_dir: Path) -> tuple[str, int]:
    """The name of the last start and how many ranks it had; "" and 0 where that is not known."""
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
    """When each rank of the start `life` last wrote its heartbeat, by the clock of the file system."""
    return dict([*_beats(run_dir / HANG, life), *_beats(run_dir / RANKS, life)])


def _beats(folder: Path, life: str) -> Iterator[tuple[int, float]]:
    for path in folder.glob("rank-*.json"):
        # A torn or foreign file is no heartbeat.
        with suppress(OSError, ValueError, DataError):
            beat = parse_json(read_regular(path, SMALL) or b"")
            if isinstance(beat, dict) and beat.get("life") == life:
                yield int(path.stem.removeprefix("rank-")), path.stat().st_mtime
