"""The normal level of a curve's last values: their median, and two measures of their spread."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from .window import Window

MAD_TO_SIGMA = 1.4826
"""1 / 0.6745: the ratio of a normal distribution's standard deviation to its median absolute deviation."""


class Baseline(Window):
    """The last `size` values, kept in sorted order."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._sorted: list[float] = []
        super().__init__(size, values)

    def push(self, value: float) -> None:
        """Add a usable value; a full baseline drops its oldest."""
        if self.full:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        insort(self._sorted, value)
        super().push(value)

    @property
    def median(self) -> float:
        """The middle value, or the mean of the two in the middle. Needs a value."""
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    @property
    def median_deviation(self) -> float:
        """Median of |value - median| (MAD), in O(log size): the values nearest the median are adjacent."""
        values, count, median = self._sorted, len(self._sorted), self.median
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
        outside = [median - values[low - 1]] if low > 0 else []
        outside += [values[low + near] - median] if low + near < count else []
        return (inner + min(outside)) / 2

    @property
    def spread(self) -> float:
        """A standard deviation: 1.4826 MAD (from the middle half) or that of all values, whichever is larger.

        They agree on normal noise. With heavy tails the second is larger, so that single hard batches are not events.
        Values of events are in neither.
        """
        return max(MAD_TO_SIGMA * self.median_deviation, self.deviation)
