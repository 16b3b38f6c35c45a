"""What a run measured beside `data.validation`: named validation sets and tasks, as its record and run.json have them.

Their entries stand in few lines, at steps that the settings of each attempt name, so only those lines are read.
"""

# N lines in which a figure stands

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kha_train.analysis.history import EVALUATIONS, Stretch
from kha_train.foreign.typed import Source, is_number
from kha_train.record.columns import Columns
from kha_train.record.reader import METRICS_FILE

VALIDATION = "validation"
SCORED = ("validation/loss", "validation/bits_per_byte")
"""Entries of `data.validation`, which columns hold."""


class Series(NamedTuple):
    """A figure over the run: int64 steps, float64 values."""

    steps_N: np.ndarray
    values_N: np.ndarray

    @property
    def last(self) -> float | None:
        """The last finite value."""
        finite = self.values_N[np.isfinite(self.values_N)]
        return float(finite[-1]) if len(finite) else None


Evaluations = Mapping[str, Mapping[str, Series]]
"""What entries begin with, such as `validation/code` -> name of a figure -> its values, in the order of the record."""


def read_evaluations(run_dir: Path, columns: Columns, stretches: Sequence[Stretch]) -> Evaluations:
    """The figures of every named validation set and task that the attempts of a curve were told of; empty, and nothing
    is read, where there were none. Raises DataError for an entry that is no number."""
    wanted = {entries for stretch in stretches for entries in _told(stretch)}
    if not wanted:
        return {}
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for line in columns.lines_at(run_dir / METRICS_FILE, _candidates(columns, stretches)):
        for key, value in line.items():
            entries, _, name = key.rpartition("/")
            if entries not in wanted:
                continue
            if not is_number(value):
                source = Source(f"{run_dir / METRICS_FILE}, step {line['step']}")
                raise source.fault(key, "is no number", value, 'a number, or "nan", "inf", "-inf"')
            steps, values = found.setdefault(entries, {}).setdefault(name, ([], []))
            steps.append(int(line["step"]))
            values.append(float(value))
    return {
        entries: {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in figures.items()}
        for entries, figures in found.items()
    }


def _told(stretch: Stretch) -> set[str]:
    """What the entries begin with of which the facts of an attempt tell."""
    inside = (key.removeprefix(EVALUATIONS) for key in stretch.facts if key.startswith(EVALUATIONS))
    return {key.rpartition(".")[0] for key in inside}


def _candidates(columns: Columns, stretches: Sequence[Stretch]) -> list[int]:
    """The steps that may have entries: those that validated, the last one, and those at which a task was due."""
    steps_N = columns.steps
    due_N = columns.has(SCORED[0]) | columns.has(SCORED[1])
    due_N[-1:] = True
    for stretch in stretches:
        inside_N = (steps_N >= stretch.first) & (steps_N <= stretch.last)
        for every in _intervals(stretch.settings or {}, stretch.last):
            due_N |= inside_N & (steps_N % every == 0)
    found: list[int] = steps_N[due_N].tolist()
    return found


def _intervals(settings: Mapping[str, Any], last: int) -> set[int]:
    """The intervals of the tasks; those above `last`, the last step, are never due."""
    every = (task.get("every_steps") for task in settings.get("evaluation.tasks") or [])
    return {steps for steps in every if isinstance(steps, int) and 0 < steps <= last}
