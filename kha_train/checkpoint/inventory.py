"""Lists a directory of checkpoints for people to read. Renames nothing and opens no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kha_train.checkpoint import layout
from kha_train.checkpoint.manifest import MANIFEST_FILE
from kha_train.checkpoint.reader import check_sizes
from kha_train.checkpoint.retention import is_marked
from kha_train.errors import CheckpointError


@dataclass(frozen=True)
class Row:
    """One checkpoint: `bytes` on disk, `saved` in local time, the number of `ranks` that wrote it, whether it is marked
    (`kept`).

    `state` is "sizes match" (bytes are not hashed), or describes what is wrong.
    """

    step: int
    path: Path
    bytes: int
    saved: str
    ranks: int
    kept: str
    state: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**vars(self), "path": str(self.path)}


def inventory(folder: Path) -> list[Row]:
    """Every directory of `folder` that may hold a checkpoint, newest first; empty when `folder` is missing."""
    return [_row(folder, step, directory) for step, directory in layout.candidates(folder)]


def _row(folder: Path, step: int, directory: Path) -> Row:
    ranks, state = 0, "sizes match"
    try:
        files = check_sizes(directory).contents.files
        ranks = len({name.split("-")[1][:5] for name in files if "-" in name})
    except (CheckpointError, OSError) as error:
        state = str(error)
    found = [path.stat() for path in directory.iterdir()] if directory.is_dir() else []
    manifest = directory / MANIFEST_FILE
    when = manifest.stat().st_mtime if manifest.exists() else max((entry.st_mtime for entry in found), default=0.0)
    saved = datetime.fromtimestamp(when).astimezone().isoformat(" ", "seconds")
    kept = "marked" if is_marked(folder, step) else ""
    return Row(step, directory, sum(entry.st_size for entry in found), saved, ranks, kept, state)
