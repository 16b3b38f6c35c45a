"""A window over the last values of a curve with its exact mean and standard deviation.

Sums in floating point remember a huge value long after it has left the window. Here values are whole multiples of
2^-80, so the sums are integers: what has left is forgotten completely, and the sums follow from the values alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

SCALE_BITS = 80
LIMIT = 1e100
_SCALE = 2.0**SCALE_BITS


def usable(value: float) -> bool:
    """Whether `value` may enter a window: finite, and below 1e100 (no loss or norm of a living run is larger)."""
    return -LIMIT < value < LIMIT


class Window:
    """The last `size` usable values. `push` and `z` cost the same however long the curve is."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.size = size
        self._values: deque[float] = deque()
        self._wholes: deque[int] = deque()
        self._sum = self._squares = 0
        for value in values:
            self.push(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def full(self) -> bool:
        """Whether it holds `size` values."""
        return len(self._values) == self.size

    @property
    def values(self) -> list[float]:
        """The values, oldest first: the whole state."""
        return list(self._values)

    @property
    def mean(self) -> float:
        """Their mean, correctly rounded; nan when there is none."""
        count = len(self._values)
        return self._sum / (count << SCALE_BITS) if count else math.nan

    @property
    def deviation(self) -> float:
        """Their population standard deviation; nan when there is none."""
        count = len(self._values)
        if not count:
            return math.nan
        return math.sqrt((count * self._squares - self._sum * self._sum) / (count * count << 2 * SCALE_BITS))

    def push(self, value: float) -> None:
        """Take in a usable value; the oldest leaves when the window was full."""
        assert usable(value), value
        whole = int(value * _SCALE)
        self._values.append(value)
        self._wholes.append(whole)
        if len(self._values) > self.size:
            self._values.popleft()
            left = self._wholes.popleft()
            # a^2 - b^2 with one product of large numbers.
            self._squares += (whole - left) * (whole + left)
            self._sum += whole - left
        else:
            self._squares += whole * whole
            self._sum += whole

    def z(self, value: float) -> float:
        """(value - mean) / deviation; 0 at the mean, +-inf beside it when the window is constant."""
        distance = value - self.mean
        deviation = self.deviation
        return distance / deviation if deviation > 0 else math.copysign(math.inf, distance) if distance else 0.0
