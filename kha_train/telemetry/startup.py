"""Measures the phases from the start of the process to the end of its first step."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """Consecutive phases: each `mark` ends the current one.

    The first phase began with the process, where the system provides that time (Linux), else with this object.
    """

    def __init__(self) -> None:
        self._last = time.monotonic() - _age_of_the_process()
        self.seconds: dict[str, float] = {}
        """Seconds by phase, in order."""

    def mark(self, phase: str) -> None:
        """The work since the last mark was `phase`; a phase may be marked again."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the start of the process to the last mark."""
        return sum(self.seconds.values())


def _age_of_the_process() -> float:
    """Seconds since this process was started; 0 where unknown."""
    status, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (status.exists() and uptime.exists()):
        return 0.0
    # The program name, in parentheses, may hold anything; the start time is the twentieth field after it.
    ticks = int(status.read_text().rpartition(")")[2].split()[19])
    return max(float(uptime.read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
