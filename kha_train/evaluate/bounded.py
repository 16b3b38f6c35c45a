"""A bound on the memory that task files of other people may take: their templates can make texts of any length."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kha_train.errors import ConfigError
from kha_train.evaluate.harness_data import Choice

MOST_BYTES = 4 << 30
"""What data and questions of a directory of task files (`Choice.include`) may take."""
_STATUS = Path("/proc/self/status")


@contextmanager
def bounded(choice: Choice) -> Iterator[None]:
    """Raises ConfigError once the block has filled `MOST_BYTES`, if `choice` has task files of a user's that are read
    as data.
    """
    if not choice.include or choice.run_code:
        yield
        return
    try:
        with _memory(MOST_BYTES):
            yield
    except MemoryError as error:
        raise ConfigError(
            f"data and questions of these tasks take more than {MOST_BYTES / 2**30:g} GiB",
            field=choice.field,
            value=",".join(choice.tasks),
            fix="fewer documents (--limit), or if you trust whoever wrote the files, no bound: --run-code",
        ) from error


@contextmanager
def _memory(most: int) -> Iterator[None]:
    """Inside the block the whole process can take `most` more bytes, then allocations fail: MemoryError. Only Linux
    says what a process has taken; elsewhere there is no bound.
    """
    taken = re.search(r"^VmData:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    if taken is None:
        yield
        return
    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([int(taken[1]) * 1024 + most, *bounds]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
