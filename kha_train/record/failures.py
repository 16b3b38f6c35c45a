"""Which rank failed first: read from the files that the ranks of a failed start left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, read_regular
from kha_train.foreign.typed import Source
from kha_train.record.schema import Failure

FAILURES = "errors"


def first_failure(run_dir: Path) -> dict[str, Any] | None:
    """Of all ranks' failures since the last start the earliest: rank, time, error, traceback. None without any.

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
    return min(found, key=lambda failure: failure["time"], default=None)


def first_failure_line(run_dir: Path) -> str:
    """The earliest failure in one line for people; "" without any. Raises DataError as `first_failure`."""
    failure = first_failure(run_dir)
    return f"rank {failure['rank']} failed first: {failure['error']}" if failure else ""
