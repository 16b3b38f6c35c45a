"""Which rank failed first: read from the files that the ranks of a failed start left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAILURES = "errors"


def first_failure(run_dir: Path) -> dict[str, Any] | None:
    """Of all ranks' failures since the last start the earliest: rank, time, error, traceback. None without any."""
    found = []
    for path in (run_dir / FAILURES).glob("rank-*.json"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            # Its rank was killed while it wrote, or the disk was full.
            continue
    return min(found, key=lambda failure: failure["time"], default=None)


def first_failure_line(run_dir: Path) -> str:
    """The earliest failure in one line for people; "" without any."""
    failure = first_failure(run_dir)
    return f"rank {failure['rank']} failed first: {failure['error']}" if failure else ""
