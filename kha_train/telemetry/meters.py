"""Small gauges read once per step: a moving average for display, the wait for data, the peak of memory."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kha_train.metric import Metric

if TYPE_CHECKING:
    import torch

GIB = 1024**3
METRICS = (
    Metric(
        "data/agreement_seconds",
        "s",
        "part of the step in which rank 0, its batch at hand, waited for those of the other ranks",
        timing=True,
    ),
    Metric(
        "memory/peak_gib",
        "GiB",
        "most memory of rank 0 since start: resident set on a CPU, allocated by torch on CUDA",
        timing=True,
    ),
)
WARM_UP_STEPS = 2
"""The first steps of an attempt may wait for compilers and caches, so they do not count for the time left."""
STEADY_STEPS = 3
"""Number of further steps needed before the time left is shown."""
_HIGH_WATER = re.compile(rb"VmHWM:\s+(\d+) kB")


class MovingAverage:
    """Exponential moving average with bias correction, for display only; non-finite values are left out.

    With `decay` d, value = sum_i d^(n-i) x_i / sum_i d^(n-i), so that the first value is shown unchanged.
    """

    def __init__(self, decay: float = 0.98) -> None:
        self.decay = decay
        self._sum = self._weight = 0.0

    def update(self, value: float) -> float:
        """Adds `value` and returns the average; nan while there was no finite value."""
        if math.isfinite(value):
            self._sum = self.decay * self._sum + value
            self._weight = self.decay * self._weight + 1.0
        return self.value

    def state(self) -> dict[str, float]:
        """The state for `restore`."""
        return {"sum": self._sum, "weight": self._weight}

    def restore(self, state: dict[str, float] | None) -> None:
        """Continue from the `state` of another average; start fresh when it is None."""
        state = state or {}
        self._sum, self._weight = state.get("sum", 0.0), state.get("weight", 0.0)

    @property
    def value(self) -> float:
        """The average so far, nan while there was no finite value."""
        return self._sum / self._weight if self._weight else math.nan


class TimeLeft:
    """The time left in a run, from the steps of this attempt: nan until they are steady."""

    def __init__(self, now: float) -> None:
        self._last_at, self._count = now, 0
        self._seconds = MovingAverage(0.95)

    def after_step(self, now: float, rows: int, rows_left: int) -> float:
        """Seconds left after a step of so many rows that ended at `now`; saving and validating before it count as part
        of it.
        """
        self._count += 1
        if self._count > WARM_UP_STEPS:
            self._seconds.update((now - self._last_at) / rows)
        self._last_at = now
        steady = self._count >= WARM_UP_STEPS + STEADY_STEPS
        return self._seconds.value * rows_left if steady else math.nan


class DataWait:
    """Seconds spent inside `with wait.measured():` since they were last taken."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds += self._clock() - start

    def take(self) -> float:
        """The seconds counted since the last call; resets the counter."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class PeakMemory:
    """Peak memory of this process since it started, in GiB: resident set on a CPU, allocated on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak_bytes = 0

    def gib(self) -> float:
        """The peak so far, in GiB."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device) / GIB
        # The kernel's own high-water mark is approximate and may decrease by a few pages.
        self._peak_bytes = max(self._peak_bytes, _peak_resident_bytes())
        return self._peak_bytes / GIB

    def total_gib(self) -> float | None:
        """The device's memory in GiB; None on a CPU, whose memory is shared."""
        if self.device.type != "cuda":
            return None
        import torch

        return torch.cuda.get_device_properties(self.device).total_memory / GIB


def _peak_resident_bytes() -> int:
    # Linux keeps ru_maxrss from the parent through exec; VmHWM belongs to this program alone.
    status = Path("/proc/self/status")
    if status.exists() and (found := _HIGH_WATER.search(status.read_bytes())):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
