"""The figures of validation sets and tasks of several runs, the last ones and over their steps."""

# N steps at which a figure was measured

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kha_train.analysis.evaluations import SCORED, VALIDATION, Series
from kha_train.analysis.runs import RunData
from kha_train.analysis.summary import UNKNOWN_FIGURE, Quantity, printed
from kha_train.analysis.validation_sets import marks, sets_sentence


@dataclass(frozen=True)
class Evaluated:
    """The last figures of a named validation set or a task: `figures` by name, one a run, None where it has none.
    `entries` is what they begin with in the record, `meanings` are as the run declared them ("" where it did not).
    `marks` and `words` say whether they are of the same rows, as those of the validation do."""

    entries: str
    figures: dict[str, tuple[float | None, ...]]
    meanings: dict[str, str]
    marks: tuple[str, ...]
    words: str

    def rows(self) -> list[tuple[Quantity, list[str]]]:
        """Each figure with its value in every run as it is printed, behind it the mark of what was scored."""
        return [
            (one := Quantity(f"{self.entries}/{name}", ".4f", self.meanings[name]), marked(one, values, self.marks))
            for name, values in self.figures.items()
        ]


def evaluated(runs: tuple[RunData, ...], entries: str) -> Evaluated:
    """The figures of all `runs` whose entries begin with `entries`."""
    of_runs = [run.evaluations.get(entries, {}) for run in runs]
    names = dict.fromkeys(name for figures in of_runs for name in figures)
    return Evaluated(
        entries=entries,
        figures={name: tuple(figures[name].last if name in figures else None for figures in of_runs) for name in names},
        meanings={name: next(filter(None, (run.meaning(f"{entries}/{name}") for run in runs)), "") for name in names},
        marks=tuple(marks(runs, entries)),
        words=sets_sentence(runs, entries),
    )


def marked(quantity: Quantity, values: Sequence[float | None], told: Sequence[str]) -> list[str]:
    """The `values` as they are printed, each followed by its mark from `told`, if any."""
    shown = [printed(quantity, value) for value in values]
    both = zip(shown, told, strict=True)
    return [f"{value} [{mark}]" if mark and value != UNKNOWN_FIGURE else value for value, mark in both]


def scored_series(run: RunData, entries: str) -> dict[str, Series]:
    """The figures of a run under `entries` by name, over its steps: those of `data.validation`, of a named set or of a
    task.
    """
    if entries != VALIDATION:
        return dict(run.evaluations.get(entries, {}))
    found = {}
    for key in SCORED:
        has_N = run.columns.has(key)
        if has_N.any():
            found[key.rpartition("/")[2]] = Series(run.steps[has_N], run.column(key)[has_N])
    return found


def last_common(reference: Series, other: Series) -> tuple[int, float] | None:
    """(step, `other` - `reference`) at the last step at which both have a finite value; None without any."""
    steps, left, right = np.intersect1d(reference.steps_N, other.steps_N, return_indices=True)
    values = reference.values_N[left], other.values_N[right]
    usable = np.flatnonzero(np.isfinite(values[0]) & np.isfinite(values[1]))
    if not len(usable):
        return None
    last = usable[-1]
    return int(steps[last]), float(values[1][last] - values[0][last])
