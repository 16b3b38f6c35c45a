"""The rows of every optimiser step: a size, and the steps from which on there are others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Steps `first` to `last`, inclusive (`last` is inf for the last stretch), of `rows` rows each."""

    first: int
    last: float
    rows: int


@dataclass(frozen=True)
class BatchSizes:
    """Steps have `rows` rows, and others from the steps in `changes` on: (step, rows), by ascending step. Steps count
    from 1.

    How many samples come before a step follows from it alone, so a run may stop and resume anywhere.
    """

    rows: int
    changes: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of_saved(flat: Mapping[str, Any]) -> BatchSizes:
        """Those of a configuration as `load_plain` reads it, by dotted keys. Runs of older releases have no schedule,
        and where nothing is said all steps count alike.
        """
        changes = ((one["start_step"], one["global_batch_size"]) for one in flat.get("data.batch_schedule") or [])
        return BatchSizes(flat.get("data.global_batch_size", 1), tuple(changes))

    def stretches(self) -> Iterator[Stretch]:
        """All steps, by size."""
        for (first, rows), (following, _) in pairwise([(1, self.rows), *self.changes, (math.inf, 0)]):
            yield Stretch(int(first), following - 1, rows)

    def stretch_of(self, step: int) -> Stretch:
        """The stretch that holds `step`."""
        return next(stretch for stretch in self.stretches() if step <= stretch.last)

    def of(self, step: int) -> int:
        """Rows of `step`."""
        return self.stretch_of(step).rows

    def total(self, first: int, last: int) -> int:
        """Rows of the steps `first` to `last`, inclusive; 0 where `last` comes before `first`."""
        steps = ((max(first, one.first), min(last, one.last), one.rows) for one in self.stretches())
        return sum(int(end - begin + 1) * rows for begin, end, rows in steps if begin <= end)

    def steps_for(self, rows: float) -> int:
        """How many first steps come nearest to `rows` rows together; at least 1."""
        done = 0
        for stretch in self.stretches():
            count = stretch.last - stretch.first + 1
            if rows - done <= count * stretch.rows:
                return max(1, stretch.first - 1 + round((rows - done) / stretch.rows))
            done += int(count) * stretch.rows
        raise AssertionError("the last stretch has no end")

    @property
    def largest(self) -> int:
        """Rows of the largest step."""
        return max(stretch.rows for stretch in self.stretches())
