"""Scoring tasks over all ranks: batches are read together, sums are made on the device, and read from it once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kha_train.data.rows.batch import Batch
from kha_train.distributed import Caught, World, as_error
from kha_train.errors import KhaError
from kha_train.evaluate.contract import Scorer, Sums, Task
from kha_train.variants.task import TaskOptions


def evaluate(engine: Scorer, tasks: Sequence[Task[TaskOptions]]) -> dict[str, float]:
    """The entries of the record that `tasks` make of the model as it is, in order.

    Collective; waits for the device once, at the end. Raises on all ranks when any rank could not read a batch, and
    DataError when a task cannot make its figures of the sums.
    """
    sums = [_sums_of_rank(engine, task) for task in tasks]
    # Each task has an all-reduce of its own: together they might be added in another order.
    totals = [engine.world.sum_(_flat(one, engine.world.device)) for one in sums]
    values = iter(torch.cat(totals).tolist() if totals else [])
    entries: dict[str, float] = {}
    for task, one in zip(tasks, sums, strict=True):
        shaped = {name: _shaped(value, values) for name, value in one.items()}
        figures = _figures(task, shaped)
        declared = {metric.name for metric in task.declared(task.config, task.options)}
        assert figures.keys() <= declared, f"{task.options.entries} made a figure it does not declare"
        entries |= {f"{task.options.entries}/{name}": value for name, value in figures.items()}
    return entries


def _sums_of_rank(engine: Scorer, task: Task[TaskOptions]) -> dict[str, Tensor | float]:
    """What the batches of this rank come to: tensors in float64 on the device, and numbers of the host."""
    sums: dict[str, Tensor | float] = {}
    for batch in _read_together(task.batches(engine.world.rank, engine.world.size), engine.world):
        for name, value in task.score(engine, batch).items():
            wide = value.double() if isinstance(value, Tensor) else float(value)
            sums[name] = sums[name] + wide if name in sums else wide
        engine.world.alive()
    return sums


def _flat(sums: Mapping[str, Tensor | float], device: torch.device) -> Tensor:
    """All sums of a task one after another, float64 on `device`. Numbers of the host cross in one copy."""
    numbers = [value for value in sums.values() if not isinstance(value, Tensor)]
    crossed = iter(torch.tensor(numbers, dtype=torch.float64, device=device).split(1))
    return torch.cat([value.flatten() if isinstance(value, Tensor) else next(crossed) for value in sums.values()])


def _shaped(value: Tensor | float, numbers: Iterator[float]) -> np.ndarray:
    """The next of `numbers` in the shape of `value`."""
    shape = value.shape if isinstance(value, Tensor) else torch.Size()
    return np.array([next(numbers) for _ in range(shape.numel())]).reshape(shape)


def _figures(task: Task[TaskOptions], sums: Sums) -> dict[str, float]:
    """What `task` makes of sums that are equal on all ranks: an error in them is raised by all of them."""
    try:
        return task.figures(sums)
    except KhaError as error:
        error.agreed = True
        raise


def _read_together(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches; before each is used, all ranks know that all have read theirs."""
    remaining = iter(batches)
    while True:
        batch = None
        with Caught() as caught:
            batch = next(remaining, None)
        error = as_error(caught.error, "read a batch") if caught.error else None
        failed, has_one, has_none = world.max_ints(*map(int, (error is not None, batch is not None, batch is None)))
        if failed:
            world.raise_together(error)
        assert not (has_one and has_none), "a task has another number of batches on some ranks"
        if batch is None:
            return
        yield batch
