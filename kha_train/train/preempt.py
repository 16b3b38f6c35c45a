"""A request to stop in good order: a signal (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2), a STOP file in the run directory, or
one that the batch script of this very job makes for signals that come before anybody listens.

The handler only sets a flag; the loop agrees on it with all ranks at the end of a step, saves, and leaves.
"""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from kha_train.record.markers import Marker, has_marker

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """While entered, `pending()` tells whether this process was asked to stop. A second Ctrl-C interrupts at once.

    Only one rank need look for the files, at every step: `run_dir` is None on the others. After `max_minutes` (0:
    never) by a clock that nobody can set, the process asks by itself: for jobs with a time limit.
    """

    def __init__(self, run_dir: Path | None, max_minutes: float = 0.0) -> None:
        self._run_dir = run_dir
        self._job_file = Path(os.environ["KHA_STOP_FILE"]) if run_dir and "KHA_STOP_FILE" in os.environ else None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pending(self) -> bool:
        """Whether to stop after this step."""
        if self._received or time.monotonic() >= self._deadline:
            return True
        # Where files cannot be seen nobody has asked by one, and this rank must not end alone amid a step.
        with suppress(OSError):
            if self._job_file is not None and self._job_file.exists():
                return True
            return self._run_dir is not None and has_marker(self._run_dir, Marker.STOP)
        return False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = True
