"""The tasks of a run: validation on every set, then what `evaluation.tasks` names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from kha_train.config.schema import RunConfig
from kha_train.data.sources import validation_sets
from kha_train.evaluate.bits_per_byte import BitsPerByte
from kha_train.evaluate.contract import RowTask, Task
from kha_train.metric import Metric
from kha_train.variants.registry import TASKS
from kha_train.variants.task import RowTaskOptions, TaskOptions

VALIDATION = "validation"
VALIDATION_ID, EVALUATION_ID = "validation_content_id", "evaluation_content_id"


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(RowTaskOptions):
    """Of the bits per byte of a validation set, whose entries begin with `validation/`, or `validation/NAME/`."""

    name: str = "bits_per_byte"

    @property
    def entries(self) -> str:
        """See `TaskOptions.entries`."""
        return f"{VALIDATION}/{self.set}" if self.set else VALIDATION


def open_tasks(config: RunConfig) -> tuple[Task[TaskOptions], ...]:
    """Everything that a run of `config` measures, opened and checked: `data.validation` first.

    Raises ConfigError and DataError as the tasks do.
    """
    return tuple(task(config, options) for task, options in _chosen(config))


def declared(config: RunConfig) -> tuple[Metric, ...]:
    """What the entries mean that the tasks of `config` make. No data are needed."""
    return tuple(
        replace(metric, name=f"{options.entries}/{metric.name}")
        for task, options in _chosen(config)
        for metric in task.declared(config, options)
    )


def _chosen(config: RunConfig) -> Iterator[tuple[type[Task[TaskOptions]], TaskOptions]]:
    """The tasks of a run, not opened yet, with their options."""
    for name in validation_sets(config):
        yield BitsPerByte, ValidationOptions(set=name, every_steps=config.validation.every_steps)
    for options in config.evaluation.tasks:
        yield TASKS[options.name].load(), options


def due(tasks: Iterable[Task[TaskOptions]], step: int, last: int) -> list[Task[TaskOptions]]:
    """Those of `tasks` that score the model after `step` of a run of `last` steps."""
    return [
        task for task in tasks if step == last or (task.options.every_steps and step % task.options.every_steps == 0)
    ]


def content_ids(tasks: Iterable[Task[TaskOptions]]) -> dict[str, str]:
    """The content ids of what `tasks` score, by the name under which a checkpoint and `resume.allow_changes` have them.
    A `RowTask` scores a validation set, which has its id already."""
    found: dict[str, str] = {}
    for task in tasks:
        kind, _, name = task.options.entries.partition("/")
        if kind == VALIDATION:
            found[f"{VALIDATION_ID}.{name}" if name else VALIDATION_ID] = task.content_id
        elif not isinstance(task, RowTask):
            found[f"{EVALUATION_ID}.{name}"] = task.content_id
    return found


def measured_facts(tasks: Iterable[Task[TaskOptions]]) -> dict[str, Any]:
    """What `run.json` says of an attempt: the rows of `data.validation`, and as `evaluations`, where there are others,
    what the figures of each are of, by what its entries begin with."""
    of = {task.options.entries: task.identity() for task in tasks}
    validation = of.pop(VALIDATION)
    found = {VALIDATION_ID: validation["content_id"], "validation_rows": validation["rows"]}
    return {**found, "evaluations": of} if of else found
