"""What a model makes of context: cross-entropy and accuracy of labels by how many tokens of their document precede.

A model that uses its context predicts later tokens better: the loss falls from one bucket to the next.
"""

# B rows  T places of a row  N labels of the flattened rows  C buckets of context

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.evaluate.contract import RowTask, Scorer, Sums
from kha_train.metric import Metric
from kha_train.model.host import to_device
from kha_train.variants.task import ContextOptions, TaskOptions

GROWTH = 4


class Context(RowTask[ContextOptions]):
    """`loss_from_N` and `accuracy_from_N` of the labels that at least N tokens of their document precede, and fewer
    than the next border. A bucket without a label has neither."""

    of_labels = True

    @classmethod
    def declared(cls, config: RunConfig, options: TaskOptions) -> tuple[Metric, ...]:
        """See `Task.declared`."""
        assert isinstance(options, ContextOptions), "TASKS pairs the task with them"
        borders = _borders(config, options)
        ranges = [*(f"to {high - 1} tokens" for high in borders[1:]), "tokens or more"]
        return tuple(
            Metric(f"{name}_from_{low}", unit, f"{what} of labels that {low} {beyond} of their document precede")
            for low, beyond in zip(borders, ranges, strict=True)
            for name, unit, what in (
                ("loss", "nats/token", "mean cross-entropy"),
                ("accuracy", "fraction", "share with the largest logit"),
            )
        )

    def __init__(self, config: RunConfig, options: ContextOptions) -> None:
        super().__init__(config, options)
        self.borders = _borders(config, options)

    def score(self, engine: Scorer, batch: Batch) -> Mapping[str, Tensor | float]:
        """See `Task.score`."""
        scores = engine.evaluate(batch, by_token=True).tokens
        assert scores is not None, "they were asked for by token"
        labelled_N = (batch.labels_BT != IGNORE_LABEL).flatten()
        # A place at position p has p + 1 tokens of its document behind the label.
        bucket_N = torch.bucketize(batch.positions_BT.flatten() + 1, torch.tensor(self.borders), right=True) - 1
        inside_CN = (bucket_N == torch.arange(len(self.borders)).unsqueeze(1)) & labelled_N
        inside_CN = to_device(inside_CN, scores.nats.device)
        # Selected, not multiplied: an infinite loss in one bucket is none in the others.
        nats_CN = torch.where(inside_CN, scores.nats.flatten().double(), 0.0)
        return {
            "labels": inside_CN.sum(1),
            "nats": nats_CN.sum(1),
            "hits": (inside_CN & scores.hits.flatten()).sum(1),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """See `Task.figures`."""
        found: dict[str, float] = {}
        columns = (sums[name].tolist() for name in ("labels", "nats", "hits"))
        for low, labels, nats, hits in zip(self.borders, *columns, strict=True):
            if labels:
                found |= {f"loss_from_{low}": nats / labels, f"accuracy_from_{low}": hits / labels}
        return found


def _borders(config: RunConfig, options: ContextOptions) -> list[int]:
    """The fewest tokens of context of each bucket."""
    powers = [GROWTH**power for power in range(16) if GROWTH**power <= config.model.seq_len]
    return list(options.borders or powers)
