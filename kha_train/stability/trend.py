"""The expected next value of a curve, and the usual deviation of its values from the expected ones.

Loss falls fastest early in training, where it also spikes most. The spread of the last values then measures the fall
and not the noise, so a spike would have to be taller than the fall of a whole window to stand out. Here a line follows
the fall, and the spread is that of the deviations from the expected values.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from .baseline import Baseline
from .window import LIMIT, usable

SIZE, AT_LEAST = 128, 64
NEWEST = 8
SCALE_FLOOR = 1e-3


class Trend:
    """The last 128 values that belong to no event, and the deviations of the last 128 judged values.

    A line goes through the medians of the older and of the newer half of the values. A median ignores a few outliers,
    so neither end of the line follows a spike. Values are counted, not steps: an event leaves no gap.

    A deviation counts after 8 further values were judged. Otherwise a spike that rises over several steps would widen
    its own scale. An event that opens discards the deviations that do not count yet.
    """

    def __init__(
        self, values: Iterable[float] = (), deviations: Iterable[float] = (), waiting: Iterable[float] = ()
    ) -> None:
        """Without `deviations`, those of the values from their own line are used, once there are 64 values."""
        self._values = deque(values, maxlen=SIZE)
        self._deviations, self._waiting = Baseline(SIZE, deviations), deque(waiting)
        self._seed()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def ready(self) -> bool:
        """Whether there are enough values, 64, to judge the next one."""
        return len(self._values) >= AT_LEAST

    @property
    def values(self) -> list[float]:
        """The values, oldest first; together with `deviations` they are the whole state."""
        return list(self._values)

    @property
    def deviations(self) -> list[float]:
        """value - expected for the judged values that count, oldest first."""
        return self._deviations.values

    @property
    def waiting(self) -> list[float]:
        """value - expected for the latest judged values, which do not count yet, oldest first."""
        return list(self._waiting)

    @property
    def expected(self) -> float:
        """The expected next value: the value of the line or, if larger, the smaller of two medians, that of the newer
        half and that of the last 8 values. Needs a value.

        A curve that stops falling rises above its line without a spike, but not above its last values.
        """
        values = self.values
        newer, slope, centre = _line(values)
        return max(newer + slope * (len(values) - centre), min(newer, median(values[-NEWEST:])))

    @property
    def scale(self) -> float:
        """The spread of the deviations that count, at least 0.001. Needs a value."""
        deviations = self._deviations if len(self._deviations) else Baseline(SIZE, self._residuals())
        return max(deviations.spread, SCALE_FLOOR)

    def push(self, value: float, deviation: float | None = None) -> None:
        """Add a usable value, and its deviation if it was judged; the oldest of each is dropped."""
        self._values.append(value)
        if deviation is not None:
            self._waiting.append(_bounded(deviation))
            if len(self._waiting) > NEWEST:
                self._deviations.push(self._waiting.popleft())
        self._seed()

    def discard_waiting(self) -> None:
        """An event opens: drop the latest deviations, which may belong to its rise."""
        self._waiting.clear()

    def _seed(self) -> None:
        if self.ready and not len(self._deviations):
            self._deviations = Baseline(SIZE, self._residuals())

    def _residuals(self) -> list[float]:
        values = self.values
        newer, slope, centre = _line(values)
        return [_bounded(value - newer - slope * (number - centre)) for number, value in enumerate(values)]


def _line(values: list[float]) -> tuple[float, float, float]:
    """(value, slope, number) of the line at the middle of the newer half of `values`, which are numbered from 0."""
    count, half = len(values), len(values) // 2
    if not half:
        return values[0], 0.0, 0.0
    older, newer = median(values[:half]), median(values[-half:])
    return newer, (newer - older) / (count - half), count - (half + 1) / 2


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two in the middle; as `statistics.median`, in half its time."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _bounded(deviation: float) -> float:
    """The deviation, small enough for a window: that of two usable values may not be."""
    return deviation if usable(deviation) else math.copysign(LIMIT / 2, deviation)
