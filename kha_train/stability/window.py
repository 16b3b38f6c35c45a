"""A window over the last values of a curve with its exact mean and standard deviation.

Floating-point sums keep rounding errors of a huge value long after it has left the window. Here values are integer
multiples of 2^-80, so the sums are exact and depend on the values in the window alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

SCALE_BITS = 80
LIMIT = 1e100
_SCALE = 2.0**SCALE_BITS


def usable(value: float) -> bool:
    """Whether `value` may enter a window: finite, and below 1e100 (real losses and norms are smaller)."""
    return -LIMIT < value < LIMIT


class Window:
    """The last `size` usable values. The cost of `push` and `z` does not depend on the length of the curve."""

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
        """The values, oldest first; they are the whole state."""
        return list(self._values)

    @property
    def mean(self) -> float:
        """The mean, correctly rounded; nan when there are no values."""
        count = len(self._values)
        return self._sum / (count << SCALE_BITS) if count else math.nan

    @property
    def deviation(self) -> float:
        """The population standard deviation; nan when there are no values."""
        count = len(self._values)
        if not count:
            return math.nan
        return math.sqrt((count * self._squares - self._sum * self._sum) / (count * count << 2 * SCALE_BITS))

    def push(self, value: float) -> None:
        """Add a usable value; a full window drops its oldest."""
        assert usable(value), value
        whole = int(value * _SCALE)
        self._values.append(value)
        self._wholes.append(whole)
        if len(self._values) > self.size:
            self._values.popleft()
            left = self._wholes.popleft()
            # a^2 - b^2 = (a - b)(a + b) needs one product of large numbers.
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
