"""The numbers of a run's record by columns, so that a comparison of many steps needs no dictionary per step.

`metrics.jsonl` is authoritative. A long one has a compact cache beside it (`columns_twin`), which is checked against
it.
"""

# C columns  N lines of the record

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.record.jsonl import parse

COLUMNS = (
    "step", "attempt", "samples_first", "samples_last", "tokens", "train/loss", "train/grad_norm", "train/lr",
    "train/skipped", "train/step_seconds", "train/tokens_per_second", "train/mfu", "memory/peak_gib", "validation/loss",
    "validation/bits_per_byte",
)  # fmt: skip
"""The metrics kept as columns. Every count fits a float exactly."""
_PLACES = {name: place for place, name in enumerate(COLUMNS)}


@dataclass(frozen=True)
class Columns:
    """The metrics `COLUMNS` of all lines. `values_CN` (float64) is nan where a line lacks a metric; `present_CN` tells
    such gaps from a loss that is nan. The line of row n is bytes `offsets_N1[n]` to `offsets_N1[n + 1]` of the record.
    """

    values_CN: np.ndarray
    present_CN: np.ndarray
    offsets_N1: np.ndarray

    def __len__(self) -> int:
        lines: int = self.values_CN.shape[1]
        return lines

    def __getitem__(self, name: str) -> np.ndarray:
        """The metric `name` of every line, float64 [N]."""
        values_N: np.ndarray = self.values_CN[_PLACES[name]]
        return values_N

    def has(self, name: str) -> np.ndarray:
        """Whether a line has the metric `name`, bool [N]."""
        present_N: np.ndarray = self.present_CN[_PLACES[name]]
        return present_N

    @property
    def steps(self) -> np.ndarray:
        """The step of every line, int64 [N]."""
        return self["step"].astype(np.int64)

    def whole(self, name: str, absent: int) -> np.ndarray:
        """The integers of the metric `name`, int64 [N]; `absent` where a line lacks it."""
        return np.where(self.has(name), self[name], absent).astype(np.int64)

    def lines(self, file: Path, first: int, last: int) -> list[dict[str, Any]]:
        """The complete lines of the steps `first` to `last`, read from the record `file`."""
        begin, end = np.searchsorted(self["step"], (first, last + 1))
        start, stop = (int(self.offsets_N1[place]) for place in (begin, end))
        with file.open("rb") as record:
            record.seek(start)
            content = record.read(stop - start)
        return [line for line in map(parse, content.split(b"\n")) if line is not None]

    def lines_at(self, file: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
        """The whole lines of `steps`, which the record `file` has."""
        lines = []
        with file.open("rb") as record:
            for place in np.searchsorted(self["step"], steps).tolist():
                record.seek(int(self.offsets_N1[place]))
                line = parse(record.readline())
                lines += [line] if line is not None else []
        return lines


def columns_of(lines: Sequence[Mapping[str, Any]], offsets_N1: np.ndarray | None = None) -> Columns:
    """The columns of checked lines."""
    values = [[line.get(name) for line in lines] for name in COLUMNS]
    present = [[value is not None for value in column] if None in column else [True] * len(lines) for column in values]
    return Columns(
        np.array(values, np.float64).reshape(len(COLUMNS), len(lines)),
        np.array(present, bool).reshape(len(COLUMNS), len(lines)),
        np.zeros(len(lines) + 1, np.int64) if offsets_N1 is None else offsets_N1,
    )


def joined(parts: Sequence[Columns]) -> Columns:
    """Columns of adjacent parts of one record, joined; needs at least one part."""
    return Columns(
        np.concatenate([part.values_CN for part in parts], axis=1),
        np.concatenate([part.present_CN for part in parts], axis=1),
        np.concatenate([parts[0].offsets_N1[:1], *(part.offsets_N1[1:] for part in parts)]),
    )
