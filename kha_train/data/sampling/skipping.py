"""Skip windows: sample numbers [first, last) that are skipped."""

# N samples

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Window = tuple[int, int]


def merged(windows: Iterable[Window]) -> tuple[Window, ...]:
    """The same windows merged and ascending, without empty ones."""
    found: list[Window] = []
    for first, last in sorted((int(first), int(last)) for first, last in windows):
        assert 0 <= first <= last, (first, last)
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        elif first < last:
            found.append((first, last))
    return tuple(found)


def numbers_past(windows: Sequence[Window], position: int, count: int) -> np.ndarray:
    """The next `count` sample numbers (int64) from `position` on that lie in none of the `merged` windows."""
    parts, missing = [], count
    for first, last in windows:
        if last <= position:
            continue
        part = np.arange(position, max(position, min(first, position + missing)), dtype=np.int64)
        parts.append(part)
        missing -= len(part)
        if not missing:
            break
        position = last
    parts.append(np.arange(position, position + missing, dtype=np.int64))
    return np.concatenate(parts)
