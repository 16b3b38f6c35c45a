"""What a model still finds in its context, by distance: rows of random ids that repeat themselves.

A block of D random ids fills each row again and again, so from the second block on every label stood D tokens before,
and nothing else predicts it (Olsson et al. 2022, arXiv 2209.11895, measure induction heads on such rows). No data are
needed, so every trained model can be asked.
"""

# B rows  W ids of a row  N labels of the flattened rows  C distances  M masked places  S borders of rows

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.errors import ConfigError
from kha_train.evaluate.contract import Scorer, Sums, Task
from kha_train.metric import Metric
from kha_train.model.host import to_device
from kha_train.variants.task import FIELD, RepeatsOptions, TaskOptions

NEAREST, GROWTH = 16, 4
SEED = 2209


class Repeats(Task[RepeatsOptions]):
    """`loss_at_D` and `accuracy_at_D` of the labels that stood D tokens before, for each distance D.

    Raises ConfigError for a distance that no row holds.
    """

    @classmethod
    def declared(cls, config: RunConfig, options: TaskOptions) -> tuple[Metric, ...]:
        """See `Task.declared`."""
        assert isinstance(options, RepeatsOptions), "TASKS pairs the task with them"
        return tuple(
            Metric(f"{name}_at_{distance}", unit, f"{what} of random ids that stood {distance} tokens before")
            for distance in _distances(config, options)
            for name, unit, what in (
                ("loss", "nats/token", "mean cross-entropy"),
                ("accuracy", "fraction", "share with the largest logit"),
            )
        )

    def __init__(self, config: RunConfig, options: RepeatsOptions) -> None:
        super().__init__(config, options)
        self.distances = _distances(config, options)
        if self.distances[-1] >= config.model.seq_len:
            raise ConfigError(
                f"a row of {config.model.seq_len} tokens has no label that stood so far before",
                field=FIELD,
                value=self.distances[-1],
                allowed=f"distances below {config.model.seq_len}",
            )

    @property
    def content_id(self) -> str:
        """See `Task.content_id`: the rows follow from these numbers."""
        told = (SEED, self.config.model.vocab_size, self.config.model.seq_len, self.options.rows, self.distances)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """See `Task.batches`. Row i of a distance has the sample number of both; fillers have -1, and no label."""
        rows, size, length = self.options.rows, self.config.engine.micro_batch_size, self.config.model.seq_len
        samples = np.arange(len(self.distances) * rows, dtype=np.int64)
        dealt = -(-len(samples) // (size * world_size)) * size * world_size
        filled = np.pad(samples, (0, dealt - len(samples)), constant_values=-1)
        borders_S = np.arange(size + 1, dtype=np.int64) * length
        for samples_B in filled.reshape(-1, world_size, size)[:, rank]:
            rows_BW = np.stack([self._row(int(number)) for number in samples_B])
            unseen_B = [self._distance(int(number)) if number >= 0 else length for number in samples_B]
            masked_M = np.concatenate([np.arange(n) + i * length for i, n in enumerate(unseen_B)])
            yield Batch(samples_B, rows_BW, Layout(borders_S, masked_M))

    def score(self, engine: Scorer, batch: Batch) -> Mapping[str, Tensor | float]:
        """See `Task.score`."""
        scores = engine.evaluate(batch, by_token=True).tokens
        assert scores is not None, "they were asked for by token"
        kind_B = torch.from_numpy(batch.samples_B) // self.options.rows
        kind_N = kind_B.repeat_interleave(self.config.model.seq_len)
        labelled_N = (batch.labels_BT != IGNORE_LABEL).flatten()
        of_CN = (kind_N == torch.arange(len(self.distances)).unsqueeze(1)) & labelled_N
        of_CN = to_device(of_CN, scores.nats.device)
        # Selected, not multiplied: an infinite loss at one distance is none at the others.
        nats_CN = torch.where(of_CN, scores.nats.flatten().double(), 0.0)
        return {
            "labels": of_CN.sum(1),
            "nats": nats_CN.sum(1),
            "hits": (of_CN & scores.hits.flatten()).sum(1),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """See `Task.figures`."""
        found: dict[str, float] = {}
        columns = (sums[name].tolist() for name in ("labels", "nats", "hits"))
        for distance, labels, nats, hits in zip(self.distances, *columns, strict=True):
            found |= {f"loss_at_{distance}": nats / labels, f"accuracy_at_{distance}": hits / labels}
        return found

    def _distance(self, number: int) -> int:
        return self.distances[number // self.options.rows]

    def _row(self, number: int) -> np.ndarray:
        """[W] ids of the sample `number`; zeros for a filler."""
        width = self.config.model.seq_len + 1
        if number < 0:
            return np.zeros(width, dtype=np.uint32)
        drawn = np.random.default_rng((SEED, number)).integers(
            self.config.model.vocab_size, size=self._distance(number), dtype=np.uint32
        )
        return np.resize(drawn, width)


def _distances(config: RunConfig, options: RepeatsOptions) -> list[int]:
    """Those of the options, or powers of 4 from 16 up to half a row; half a row where it is shorter."""
    half = config.model.seq_len // 2
    powers = [NEAREST * GROWTH**power for power in range(16) if NEAREST * GROWTH**power <= half]
    return list(options.distances or powers or [max(1, half)])
