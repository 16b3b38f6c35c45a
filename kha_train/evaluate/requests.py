"""Texts whose ends are scored: as rows of ids, dealt to ranks in batches, and their scores.

A row is one document in a batch row of its own, padded on the right. Every model is causal and routes no padding, so
the scores of a row do not depend on its neighbours, or on how many there are.
"""

# B rows of a batch  T places of a row  W = T + 1  R rows of all batches  S ends of rows

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.errors import ConfigError
from kha_train.evaluate.contract import Scorer
from kha_train.model.host import to_device


class Row(NamedTuple):
    """The `ids` of a text, and how many of the last ones are `scored`."""

    ids: tuple[int, ...]
    scored: int


class Score(NamedTuple):
    """The log-probability of the scored ids in nats, and whether each of them had the largest logit."""

    log_probability: float
    greedy: bool


def row_of(context: Sequence[int], continuation: Sequence[int], longest: int) -> Row:
    """The row that scores `continuation` after `context`. A model that sees `longest` tokens at once is shown the last
    ones.

    Raises ConfigError when they do not reach back to the token before the continuation.
    """
    if len(continuation) > longest:
        raise ConfigError(
            f"an answer of {len(continuation)} tokens is longer than what the model sees at once",
            field="tasks",
            value=len(continuation),
            allowed=f"{longest} tokens",
        )
    return Row(tuple((*context, *continuation)[-(longest + 1) :]), len(continuation))


def deal(rows: Sequence[Row], size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """The batches of `rank`, of at most `size` rows each, the longest rows first. Every rank gets equally many batches
    of equal shapes. `samples_B` has the number of the row, or -1 for a filler.
    """
    longest_first = sorted(range(len(rows)), key=lambda number: (-len(rows[number].ids), number))
    for first in range(0, len(rows), size * world_size):
        together = longest_first[first : first + size * world_size]
        share = -(-len(together) // world_size)
        own = together[rank * share : (rank + 1) * share]
        yield _batch(rows, own, share, max(1, len(rows[together[0]].ids) - 1))


def tally(scorer: Scorer, batch: Batch, rows: int) -> dict[str, Tensor]:
    """What `batch` adds to the sums over all `rows` [R]: `nats` of the scored ids, and how many were `missed`."""
    tokens = scorer.evaluate(batch, by_token=True).tokens
    assert tokens is not None, "they were asked for by token"
    device = tokens.nats.device
    number_B = to_device(torch.from_numpy(batch.samples_B.clip(min=0)), device)
    # Every label of a filler is masked, so it adds zeros to the first row.
    nats_B = tokens.nats.double().sum(1)
    missed_B = (to_device(batch.labels_BT != IGNORE_LABEL, device) & ~tokens.hits).sum(1).double()
    zeros_R = torch.zeros(rows, dtype=torch.float64, device=device)
    return {
        "nats": zeros_R.index_add(0, number_B, nats_B),
        "missed": zeros_R.index_add(0, number_B, missed_B),
    }


def scores_of(nats_R: np.ndarray, missed_R: np.ndarray) -> list[Score]:
    """The scores of all rows, from their sums."""
    return [Score(-nats, missed == 0) for nats, missed in zip(nats_R.tolist(), missed_R.tolist(), strict=True)]


def score_rows(scorer: Scorer, rows: Sequence[Row], size: int, advance: Callable[[int], None]) -> list[Score]:
    """The scores of all `rows`, in one process, `size` rows at a time. `advance` is called for every row."""
    nats_R, missed_R = np.zeros(len(rows)), np.zeros(len(rows))
    for batch in deal(rows, size, 0, 1):
        found = tally(scorer, batch, len(rows))
        nats_R += found["nats"].cpu().numpy()
        missed_R += found["missed"].cpu().numpy()
        advance(len(batch.samples_B))
    return scores_of(nats_R, missed_R)


def _batch(rows: Sequence[Row], own: Sequence[int], size: int, T: int) -> Batch:
    """The rows with the numbers `own` in a batch of `size` rows of `T` places."""
    samples_B, filled_B = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=np.int64)
    rows_BW, masked_BT = np.zeros((size, T + 1), dtype=np.uint32), np.ones((size, T), dtype=bool)
    for place, number in enumerate(own):
        ids, scored = rows[number]
        samples_B[place], filled_B[place] = number, max(1, len(ids) - 1)
        rows_BW[place, : len(ids)] = ids
        masked_BT[place, len(ids) - 1 - scored : len(ids) - 1] = False
    borders_S = np.arange(size + 1, dtype=np.int64) * T
    return Batch(samples_B, rows_BW, Layout(borders_S, np.flatnonzero(masked_BT), filled_B))
