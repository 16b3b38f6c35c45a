"""The contract of an evaluation task: it has batches, scores them one by one, and makes figures of the sums.

A task is opened once by every rank, before the first step. When it is due, each rank scores its own batches; the sums
over batches and ranks are read from the device once, and every rank makes the same figures of them. A task derives from
`Task`, or from `RowTask` where it scores held-out rows, and has a line in `variants/registry.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from kha_train.config.build import to_plain
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.data.stream import ValidationSet
from kha_train.distributed import World
from kha_train.metric import Metric
from kha_train.model.decoder import DecoderOutput
from kha_train.variants.task import RowTaskOptions, TaskOptions

Sums = Mapping[str, np.ndarray]
"""Sums over all batches of all ranks by name, float64 on the host, each of the shape that `score` gave it."""
WHEN_AND_WHERE = ("name", "label", "every_steps", "set", "rows")
"""Options that are no part of what a task measures: the name and the rows are told apart."""

Options_co = TypeVar("Options_co", bound=TaskOptions, covariant=True)


class Scorer(Protocol):
    """What a task asks of an engine, or of a model that nobody trains here."""

    @property
    def world(self) -> World:
        """The ranks that score together."""

    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """The loss of `batch`, or with `by_token` the score of each label. Collective."""


class Task(ABC, Generic[Options_co]):
    """A measurement of the model, made of its `options` and the run's `config`.

    Its entries in the record are `options.entries`, a slash and the name of a figure. Opening it (`__init__`) opens and
    checks its data. It raises ConfigError or DataError where they are missing, damaged or do not fit the model.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ()
    """What its figures mean. Their names have no slash: `options.entries` stands before them in the record."""

    def __init__(self, config: RunConfig, options: Options_co) -> None:
        self.config, self.options = config, options

    @classmethod
    def declared(cls, config: RunConfig, options: TaskOptions) -> tuple[Metric, ...]:
        """What every figure means that it can make. A task whose figures follow from its options overrides this."""
        return cls.metrics

    @property
    @abstractmethod
    def content_id(self) -> str:
        """What names the data it scores. A run may not go on with other data unless it is allowed to."""

    @abstractmethod
    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """What `rank` scores, of `engine.micro_batch_size` rows: equally many batches on every rank."""

    @abstractmethod
    def score(self, engine: Scorer, batch: Batch) -> Mapping[str, Tensor | float]:
        """The summands of one batch by name, the same names and shapes for each. It asks the engine as often for every
        batch, and does not wait for the device: what is on it is returned as a tensor, counts of the host as
        numbers."""

    @abstractmethod
    def figures(self, sums: Sums) -> dict[str, float]:
        """Figures by name, as `declared` has them; one that cannot be known is left out.

        Raises DataError where the sums show that the data cannot be scored: all ranks do, for the sums are the same.
        """

    def identity(self) -> dict[str, Any]:
        """What the figures are of, as plain values: they compare with those of an equal identity alone."""
        settings = {key: value for key, value in to_plain(self.options).items() if key not in WHEN_AND_WHERE}
        return {"task": self.options.name, "content_id": self.content_id, **settings}


class RowTask(Task[Options_co]):
    """A task that scores the first rows of a validation set: `rows`, which are dealt to the ranks in turn."""

    of_labels: ClassVar[bool] = False
    """Whether its sums are over single labels, so that ranks that share rows (`engine.context_parallel`) can each score
    a part of every row. Otherwise each scores whole rows."""

    def __init__(self, config: RunConfig, options: Options_co) -> None:
        super().__init__(config, options)
        assert isinstance(options, RowTaskOptions), "a task of rows has their options"
        self.rows = ValidationSet(config, options.set, options.rows)

    @property
    def content_id(self) -> str:
        """See `Task.content_id`."""
        return self.rows.shards.content_id

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """See `Task.batches`."""
        parts = self.config.engine.context_parallel if self.of_labels and world_size > 1 else 1
        return self.rows.batches(rank, world_size, parts)

    def identity(self) -> dict[str, Any]:
        """See `Task.identity`. The run's settings say how the rows are cut."""
        return {**super().identity(), "rows": self.rows.scored_rows}
