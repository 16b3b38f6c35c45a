"""Where the time goes from the start of the process to the end of its first step."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """Phases that follow each other without a gap: each `mark` ends the one under way.

    The first began with the process itself, where the system tells when that was (Linux), else with this object.
    """

    def __init__(self) -> None:
        self._last = time.monotonic() - _age_of_the_process()
        self.seconds: dict[str, float] = {}
        """By phase, in order."""

    def mark(self, phase: str) -> None:
        """What was done since the last mark was `phase`; a phase may be marked again."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the start of the process to the last mark."""
        return sum(self.seconds.values())


def _age_of_the_process() -> float:
    """Seconds since this process was started; 0 where that is not told."""
    status, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (status.exists() and uptime.exists()):
        return 0.0
    # The name of the program, in brackets, may hold anything; the start is the twentieth field after it.
    ticks = int(status.read_text().rpartition(")")[2].split()[19])
    return max(float(uptime.read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
