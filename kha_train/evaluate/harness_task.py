"""Tasks of lm-evaluation-harness while a model trains, each rank scoring its share of the answers.

The requests are made once, when the task is opened, and scored like other batches. Their scores are sums with a slot
for each request, so every rank makes the same figures of all of them. Only tasks that compare likelihoods can run here:
generated text needs a decoder of one rank's own (`kha eval`).
"""

# R requests

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.decode.generate import tokenizer_of
from kha_train.errors import ConfigError
from kha_train.evaluate.contract import Scorer, Sums, Task
from kha_train.evaluate.harness import Suite
from kha_train.evaluate.harness_data import Choice
from kha_train.evaluate.requests import deal, scores_of, tally
from kha_train.evaluate.task_files import METRICS
from kha_train.evaluate.text_model import Text
from kha_train.metric import Metric
from kha_train.variants.task import FIELD, HarnessOptions, TaskOptions


class HarnessTask(Task[HarnessOptions]):
    """The figures of each task or group that is named, as `TASK_METRIC`.

    Raises ConfigError without the harness or a tokenizer, for an unknown task, missing data, a task that generates
    text, and one that would run code.
    """

    @classmethod
    def declared(cls, config: RunConfig, options: TaskOptions) -> tuple[Metric, ...]:
        """See `Task.declared`. Which of them a task has, its file says."""
        assert isinstance(options, HarnessOptions), "TASKS pairs the task with them"
        return tuple(
            Metric(f"{task}_{name}", _UNITS.get(name, "1"), f"{name} of {task} in lm-evaluation-harness")
            for task in options.tasks
            for name in METRICS
        )

    def __init__(self, config: RunConfig, options: HarnessOptions) -> None:
        super().__init__(config, options)
        tokenizer = tokenizer_of(config)
        if tokenizer is None:
            raise ConfigError("tasks of texts need a tokenizer, and the data have none", field=FIELD, value="harness")
        self._text = Text.of(tokenizer, config.model.seq_len, options.prefix)
        where = (options.data, options.include)
        self._suite = Suite(Choice(options.tasks, *where, options.limit, options.shots, field=FIELD))
        if tags := [name for name in options.tasks if name not in self._suite.names]:
            raise ConfigError("is a tag of several tasks", field=FIELD, value=tags[0], fix="name the tasks themselves")
        asked = None if self._suite.generates else self._suite.ask(self._text)
        if asked is None or asked.prompts:
            raise ConfigError(
                "one of these tasks generates text, which a model in training does not",
                field=FIELD,
                value=",".join(options.tasks),
                fix="leave it to `kha eval`, which takes checkpoints too",
            )
        self._asked = asked

    @property
    def content_id(self) -> str:
        """See `Task.content_id`: of everything that is asked, as text."""
        return self._asked.content_id

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """See `Task.batches`."""
        return deal(self._asked.rows, self.config.engine.micro_batch_size, rank, world_size)

    def score(self, engine: Scorer, batch: Batch) -> Mapping[str, Tensor | float]:
        """See `Task.score`: a slot for each request [R]."""
        return tally(engine, batch, len(self._asked.rows))

    def figures(self, sums: Sums) -> dict[str, float]:
        """See `Task.figures`."""
        scores = scores_of(sums["nats"], sums["missed"])
        found = self._suite.results(self._text, self._asked, scores, (), errors=False)
        return {
            f"{task}_{name}": figure.value
            for task in self.options.tasks
            if task in found
            for name, figure in found[task].figures.items()
            if name in METRICS and figure.value is not None
        }

    def identity(self) -> dict[str, Any]:
        """See `Task.identity`. Where the data lie does not matter, for the content id is of what is asked."""
        options = self.options
        return {
            "task": options.name,
            "content_id": self.content_id,
            "tasks": list(options.tasks),
            "prefix": options.prefix or "eos",
        }


_UNITS = {
    **dict.fromkeys(("acc", "acc_bytes", "acc_mutual_info", "acc_norm", "exact_match", "f1"), "fraction"),
    "bits_per_byte": "bits/byte",
}
