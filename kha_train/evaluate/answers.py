"""How often a model answers the questions of a synthetic task, by difficulty (docs/tasks.md).

An answer is the run of symbols after an answer mark. Only its labels are scored, and only in documents that lie whole
in their row. The correct tokens of an answer precede each label, as in training: if every label has the largest logit,
greedy decoding gives this very answer.
"""

# B rows  W ids of a row  P labels of answers, row by row  A answers of a batch  C buckets of difficulty

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.errors import ConfigError, DataError, Settings
from kha_train.evaluate.contract import RowTask, Scorer, Sums
from kha_train.metric import Metric
from kha_train.model.host import to_device
from kha_train.variants.task import RowTaskOptions, TaskOptions

_FIGURES = (
    ("loss", "nats/token", "mean cross-entropy of the labels of answers"),
    ("token_accuracy", "fraction", "labels of answers that had the largest logit"),
    ("answer_accuracy", "fraction", "answers all of whose labels had the largest logit"),
)


class Reading(NamedTuple):
    """How answers are found in the ids of a dataset: documents start with `begin` and finish with one of `ends`, an id
    for each level. An answer is the symbols, ids from `first_symbol` on, after `mark`."""

    begin: int
    mark: int
    first_symbol: int
    ends: dict[int, int]


class Found(NamedTuple):
    """The labels of answers in rows: `places_P`, their places in the flattened rows without the last id; `answer_P`,
    the number of the answer each belongs to; `level_A`, the level of each answer. All int64."""

    places_P: np.ndarray
    answer_P: np.ndarray
    level_A: np.ndarray


class Answers(RowTask[RowTaskOptions]):
    """`loss`, `token_accuracy` and `answer_accuracy` of all answers, and `..._from_N` of those whose level is N or
    more and below the next border: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on up to `model.seq_len`.

    Raises ConfigError for a set that is no synthetic task, DataError when no whole document is in its rows.
    """

    @classmethod
    def declared(cls, config: RunConfig, options: TaskOptions) -> tuple[Metric, ...]:
        """See `Task.declared`."""
        by_level = (
            Metric(f"{name}_from_{low}", unit, f"{what}, of level {low} and up to the next border")
            for low in _borders(config)
            for name, unit, what in _FIGURES
        )
        return (*(Metric(*figure) for figure in _FIGURES), *by_level)

    def __init__(self, config: RunConfig, options: RowTaskOptions) -> None:
        super().__init__(config, options)
        corpus = self.rows.shards.manifest.corpus
        self.reading = _reading(corpus, self.rows.field)
        self.borders = np.array(_borders(config))
        if not any(len(find(batch.rows_BW, self.reading).level_A) for batch in self.rows.batches(0, 1)):
            raise DataError(
                f"the first {self.rows.scored_rows} rows have no answer in a whole document",
                field=self.rows.field,
                fix=Settings(f"data.packing=best_fit model.seq_len={corpus.get('longest')}"),
            )

    def score(self, engine: Scorer, batch: Batch) -> Mapping[str, Tensor | float]:
        """See `Task.score`."""
        scores = engine.evaluate(batch, by_token=True).tokens
        assert scores is not None, "they were asked for by token"
        found, device = find(batch.rows_BW, self.reading), scores.nats.device
        bucket_of_A = np.searchsorted(self.borders, found.level_A, side="right") - 1
        places_P, answer_P, bucket_A = (
            to_device(torch.from_numpy(one), device) for one in (found.places_P, found.answer_P, bucket_of_A)
        )
        hits_P = scores.hits.flatten()[places_P]
        # Counts are exact in whatever order they are added.
        misses_A = torch.zeros(len(bucket_A), dtype=torch.float64, device=device)
        misses_A.index_add_(0, answer_P, (~hits_P).double())
        buckets_C1 = torch.arange(len(self.borders), device=device).unsqueeze(1)
        label_CP, answer_CA = bucket_A[answer_P] == buckets_C1, bucket_A == buckets_C1
        # Selected, not multiplied: an infinite loss in one bucket is none in the others.
        nats_CP = torch.where(label_CP, scores.nats.flatten()[places_P].double(), 0.0)
        return {
            "labels": label_CP.sum(1),
            "nats": nats_CP.sum(1),
            "hits": (label_CP & hits_P).sum(1),
            "answers": answer_CA.sum(1),
            "whole": (answer_CA & (misses_A == 0)).sum(1),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """See `Task.figures`."""
        made = _figures({name: float(one.sum()) for name, one in sums.items()}, "")
        for bucket, low in enumerate(self.borders.tolist()):
            if sums["answers"][bucket]:
                made |= _figures({name: float(one[bucket]) for name, one in sums.items()}, f"_from_{low}")
        return made

    def identity(self) -> dict[str, Any]:
        """See `Task.identity`."""
        corpus = self.rows.shards.manifest.corpus
        return {**super().identity(), "question": corpus.get("task"), "level": corpus["answers"].get("level")}


def find(rows_BW: np.ndarray, reading: Reading) -> Found:
    """The answers of whole documents in rows of ids."""
    ids_BW = rows_BW.astype(np.int64)
    index_BW = np.broadcast_to(np.arange(ids_BW.shape[1]), ids_BW.shape)
    level_of = dict(reading.ends)
    end_BW, symbol_BW = np.isin(ids_BW, list(level_of)), ids_BW >= reading.first_symbol
    border_BW = end_BW | (ids_BW == reading.begin)
    mark_BW = _last(~symbol_BW, index_BW)
    before_BW, after_BW = _last(border_BW, index_BW), _next(border_BW, index_BW)
    inside_BW = symbol_BW & (np.minimum(mark_BW, before_BW) >= 0) & (after_BW < ids_BW.shape[1])
    rows, columns = np.nonzero(inside_BW)
    marks, before, after = (one[rows, columns] for one in (mark_BW, before_BW, after_BW))
    kept = (ids_BW[rows, marks] == reading.mark) & (ids_BW[rows, before] == reading.begin) & end_BW[rows, after]
    rows, columns, marks, after = rows[kept], columns[kept], marks[kept], after[kept]
    _, first, answer_P = np.unique(rows * ids_BW.shape[1] + marks, return_index=True, return_inverse=True)
    levels = [level_of[number] for number in ids_BW[rows, after][first].tolist()]
    return Found(rows * (ids_BW.shape[1] - 1) + columns - 1, answer_P, np.array(levels, dtype=np.int64))


def _last(is_BW: np.ndarray, index_BW: np.ndarray) -> np.ndarray:
    """For each id the last place up to it where `is_BW` holds, -1 without one."""
    last_BW: np.ndarray = np.maximum.accumulate(np.where(is_BW, index_BW, -1), axis=1)
    return last_BW


def _next(is_BW: np.ndarray, index_BW: np.ndarray) -> np.ndarray:
    """For each id the next place from it on where `is_BW` holds, the width of the row without one."""
    placed_BW = np.where(is_BW, index_BW, is_BW.shape[1])
    next_BW: np.ndarray = np.minimum.accumulate(placed_BW[:, ::-1], axis=1)[:, ::-1]
    return next_BW


def _figures(sums: Mapping[str, float], suffix: str) -> dict[str, float]:
    return {
        f"loss{suffix}": sums["nats"] / sums["labels"],
        f"token_accuracy{suffix}": sums["hits"] / sums["labels"],
        f"answer_accuracy{suffix}": sums["whole"] / sums["answers"],
    }


def _borders(config: RunConfig) -> list[int]:
    """The lowest level of each bucket: the powers of two and the numbers halfway between them."""
    powers = [1 << power for power in range(config.model.seq_len.bit_length())]
    return [
        border for border in sorted({*powers, *(power * 3 // 2 for power in powers)}) if border <= config.model.seq_len
    ]


def _reading(corpus: dict[str, Any], field: str) -> Reading:
    """Raises ConfigError for a manifest that says nothing of answers, or not in this form."""
    described: Any = corpus.get("answers")
    try:
        ends = {int(number): int(level) for number, level in described["ends"].items()}
        reading = Reading(described["begin"], described["mark"], described["first_symbol"], ends)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(
            "is no dataset of a synthetic task: its manifest does not say how answers are found",
            field=field,
            fix="`kha data synthetic` makes one",
        ) from error
    return reading
