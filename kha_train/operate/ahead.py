"""Reads and summarises long runs in several processes, before they are compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.workers import Advance, each
from kha_train.analysis.runs import RunData, load_run
from kha_train.analysis.summary import Summary, summarise
from kha_train.errors import KhaError, MachineError
from kha_train.literal import say
from kha_train.record.columns import Columns
from kha_train.record.reader import METRICS_FILE

WORTH = 64 * 2**20
"""Bytes of records below which starting processes takes longer than reading here."""
MOST = 4
"""Maximum number of processes: each holds the columns of one run."""


@dataclass(frozen=True)
class Ahead:
    """The runs that were read ahead, by directory. Other runs are read on demand."""

    read: Mapping[Path, tuple[Columns, Summary]] = field(default_factory=dict)

    def run(self, path: Path) -> RunData:
        """As `load_run`."""
        found = self.read.get(path)
        return load_run(path, found[0] if found else None)

    def summary(self, run: RunData) -> Summary:
        """As `summarise`."""
        found = self.read.get(run.path)
        return found[1] if found else summarise(run)


def read_ahead(paths: Sequence[Path]) -> Ahead:
    """Read and summarise the runs in `paths` in parallel, if there are several long ones. Runs that cannot be read are
    left out, and raise their error when they are loaded. If a process is killed or does not start, the remaining runs
    are left out too.
    """
    if len(paths) < 2 or sum(map(_size, paths)) < WORTH:
        return Ahead()
    workers = min(len(paths), MOST, processors())
    if workers < 2:
        return Ahead()
    found: dict[Path, tuple[Columns, Summary]] = {}
    try:
        for path, read in zip(paths, each(_read, paths, workers, None), strict=True):
            found |= {} if read is None else {path: read}
    except (MachineError, MemoryError, OSError, EOFError):
        say("note: a helper process was killed or did not start: the runs are read one after another", err=True)
    return Ahead(found)


def processors() -> int:
    """The number of processors that this process may use; all of them on systems that do not say, such as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path, advance: Advance) -> tuple[Columns, Summary] | None:
    try:
        run = load_run(path)
        return run.columns, summarise(run)
    except (KhaError, OSError):
        return None


def _size(path: Path) -> int:
    try:
        return (path / METRICS_FILE).stat().st_size
    except OSError:
        return 0
