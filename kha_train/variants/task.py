"""The contract of an evaluation task's options: the header, free of torch, of what `kha_train/evaluate` scores with.

A task is chosen in `evaluation.tasks` by its registry name (see `registry.py`). Options say when it runs and what it
scores; a task that needs more settings derives its own from here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kha_train.errors import ConfigError

FIELD = "evaluation.tasks"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What names a validation set, or a task, in the keys of the record."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What every task has. `name` selects one. It runs every `every_steps` steps (0: only after the last one), and
    after the last one in any case. Its entries in the record begin with `evaluation/LABEL/`; `label` is the name unless
    it is set, and tells two tasks of one name apart."""

    name: str
    label: str = ""
    every_steps: int = 0

    @property
    def entries(self) -> str:
        """What its entries in the record begin with, before the last slash."""
        return f"evaluation/{self.label or self.name}"

    def invalid(self, sets: Collection[str]) -> ConfigError | None:
        """What is wrong with these options beside the named validation `sets`, or None."""
        if self.label and not LABEL.fullmatch(self.label):
            return ConfigError(
                "cannot be part of a key of the record", field=FIELD, value=self.label, allowed=LABEL.pattern
            )
        return None


@dataclass(frozen=True, kw_only=True)
class RowTaskOptions(TaskOptions):
    """Of a task that scores held-out rows: those of the validation set `set` (a name in `validation.sets`, or "" for
    `data.validation`), the first `rows` of them (0: as many as a validation scores)."""

    set: str = ""
    rows: int = 0

    def invalid(self, sets: Collection[str]) -> ConfigError | None:
        """See `TaskOptions.invalid`."""
        if self.set and self.set not in sets:
            return ConfigError(
                f"the task {self.label or self.name} scores a set that does not exist",
                field=FIELD,
                value=self.set,
                allowed=", ".join(sets) or "none, for validation.sets is empty",
            )
        return super().invalid(sets)


@dataclass(frozen=True, kw_only=True)
class ContextOptions(RowTaskOptions):
    """`borders` begin the buckets: the fewest tokens of context that belong to each, ascending, the first of them 1.
    Without any they are 1, 4, 16, 64 and so on, up to `model.seq_len`."""

    borders: tuple[int, ...] = ()

    def invalid(self, sets: Collection[str]) -> ConfigError | None:
        """See `TaskOptions.invalid`."""
        if self.borders and (self.borders[0] != 1 or any(low >= high for low, high in pairwise(self.borders))):
            return ConfigError(
                "borders of context do not ascend from 1", field=FIELD, value=list(self.borders), allowed="as [1,16,64]"
            )
        return super().invalid(sets)


@dataclass(frozen=True, kw_only=True)
class RepeatsOptions(TaskOptions):
    """Of a task that repeats blocks of random ids: the `distances` at which each id stands again, and the `rows` that
    are scored for each. Without any they are 16, 64, 256 and so on, up to half of `model.seq_len`."""

    distances: tuple[int, ...] = ()
    rows: int = 16

    def invalid(self, sets: Collection[str]) -> ConfigError | None:
        """See `TaskOptions.invalid`."""
        if self.rows < 1 or any(low >= high for low, high in pairwise((0, *self.distances))):
            return ConfigError(
                "distances ascend from 1, and each needs a row",
                field=FIELD,
                value=list(self.distances),
                allowed="[16,64]",
            )
        return super().invalid(sets)


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(TaskOptions):
    """Of `tasks` of lm-evaluation-harness, by their names there. Their data lie below the directory `data`, and task
    files of your own in the directory `include` (docs/evaluate.md). The first `limit` documents of each are scored (0:
    all), with `shots` examples before a question (null: as the task says). `prefix` names the special id before a text
    that nothing precedes ("": eos)."""

    tasks: tuple[str, ...] = ()
    data: str = ""
    include: str = ""
    limit: int = 0
    shots: int | None = None
    prefix: str = ""

    def invalid(self, sets: Collection[str]) -> ConfigError | None:
        """See `TaskOptions.invalid`."""
        wrong = [name for name in self.tasks if not LABEL.fullmatch(name)]
        if not self.tasks or wrong or len(set(self.tasks)) != len(self.tasks):
            return ConfigError(
                "needs the names of tasks, each once" if not wrong else "cannot be part of a key of the record",
                field=FIELD,
                value=wrong or list(self.tasks),
                allowed="as {name: harness, tasks: [kha_choice]}",
            )
        return super().invalid(sets)


def invalid_tasks(sets: Sequence[str], tasks: Sequence[TaskOptions]) -> ConfigError | None:
    """What is wrong with the names of validation `sets`, or with `tasks`, or None: both are keys of the record."""
    for name in sets:
        if not LABEL.fullmatch(name):
            return ConfigError(
                "cannot be part of a key of the record", field="validation.sets", value=name, allowed=LABEL.pattern
            )
    if len(set(sets)) != len(sets):
        return ConfigError("two sets of one name", field="validation.sets", value=list(sets))
    for problem in (task.invalid(sets) for task in tasks):
        if problem:
            return problem
    entries = [task.entries for task in tasks]
    if len(set(entries)) != len(entries):
        return ConfigError(
            "two tasks would write the same entries", field=FIELD, value=entries, fix="give each a label"
        )
    return None
