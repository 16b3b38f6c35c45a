"""Creates the points of a recorded curve one by one from its columns, so that a long curve is never a list of
objects.
"""

# N lines of the record  P points of the curve

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from kha_train.record.columns import Columns
from kha_train.stability.events import Observation

AT_ONCE = 4096


class Points(Sequence[Observation]):
    """The lines of a record that have a loss."""

    def __init__(self, columns: Columns) -> None:
        chosen_N = columns.has("train/loss")
        floats = {"loss": "train/loss", "grad_norm": "train/grad_norm", "lr": "train/lr"}
        counts = {"step": 0, "tokens": 0, "samples_first": -1, "samples_last": -1}
        fields = {name: columns[metric][chosen_N] for name, metric in floats.items()}
        fields |= {name: columns.whole(name, absent)[chosen_N] for name, absent in counts.items()}
        self._fields_P: list[np.ndarray] = [fields[name] for name in Observation._fields]

    def __len__(self) -> int:
        return len(self._fields_P[0])

    @overload
    def __getitem__(self, place: int) -> Observation: ...

    @overload
    def __getitem__(self, place: slice) -> list[Observation]: ...

    def __getitem__(self, place: int | slice) -> Observation | list[Observation]:
        if isinstance(place, slice):
            return [Observation(*values) for values in zip(*(f[place].tolist() for f in self._fields_P), strict=True)]
        return Observation(*(field[place].item() for field in self._fields_P))

    def __iter__(self) -> Iterator[Observation]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]

    def __repr__(self) -> str:
        return repr(tuple(self))

    def field(self, name: str) -> np.ndarray:
        """The values of one field of `Observation` at every point, [P]."""
        values_P: np.ndarray = self._fields_P[Observation._fields.index(name)]
        return values_P


def field_of(points: Sequence[Observation], name: str) -> np.ndarray:
    """As `Points.field`, of any points."""
    return points.field(name) if isinstance(points, Points) else np.array([getattr(point, name) for point in points])
