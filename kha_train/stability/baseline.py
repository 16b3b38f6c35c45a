"""Median and median absolute deviation of the last values of a curve, kept sorted as they come and go."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

MAD_TO_SIGMA = 1.4826
"""1 / 0.6745: the standard deviation of a normal distribution over its median absolute deviation."""


class Baseline:
    """The last `size` values that belong to no event, and what is normal among them."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.size = size
        self._values: deque[float] = deque()
        self._sorted: list[float] = []
        for value in values:
            self.push(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> list[float]:
        """The values, oldest first: the whole state."""
        return list(self._values)

    def push(self, value: float) -> None:
        """Take in a finite value; the oldest leaves when the baseline was full."""
        self._values.append(value)
        insort(self._sorted, value)
        if len(self._values) > self.size:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]

    def median(self) -> float:
        """The middle value, or the mean of the two in the middle. Needs a value."""
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    def median_deviation(self) -> float:
        """Median of |value - median| (MAD), in O(log size): the values nearest the median lie side by side."""
        values, count, median = self._sorted, len(self._sorted), self.median()
        near = (count + 1) // 2
        low, high = 0, count - near
        while low < high:
            middle = (low + high) // 2
            if median - values[middle] > values[middle + near] - median:
                low = middle + 1
            else:
                high = middle
        inner = max(median - values[low], values[low + near - 1] - median)
        if count % 2:
            return inner
        outside = []
        if low > 0:
            outside.append(median - values[low - 1])
        if low + near < count:
            outside.append(values[low + near] - median)
        return (inner + min(outside)) / 2

    def largest_deviation(self) -> float:
        """The largest |value - median|: how far the noise of this curve reaches by itself."""
        median = self.median()
        return max(median - self._sorted[0], self._sorted[-1] - median)
