"""Recall of repeated ids by distance: the rows, what an ideal and a blind model score, and ranks that share them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kha_train.config.compose import compose
from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.batch import Batch
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.evaluate.repeats import Repeats
from kha_train.evaluate.scoring import evaluate
from kha_train.model.loss import TokenScores
from kha_train.variants.task import RepeatsOptions

SMALL = ("model.seq_len=64", "model.vocab_size=97", "engine.micro_batch_size=3", "engine.device=cpu")


def task_of(**options: Any) -> Repeats:
    return Repeats(compose([*SMALL]), RepeatsOptions(name="repeats", **options))


class Engine:
    """Knows the ids up to `reach` tokens before, and is blind beyond."""

    world = World.single()

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def evaluate(self, batch: Batch, by_token: bool = False) -> SimpleNamespace:
        tokens, labels = batch.tokens_BT, batch.labels_BT
        seen = torch.zeros_like(labels, dtype=torch.bool)
        for back in range(self.reach):
            seen[:, back:] |= tokens[:, : tokens.shape[1] - back] == labels[:, back:]
        return SimpleNamespace(tokens=TokenScores(torch.where(seen, 0.0, math.log(97)), seen))


def test_every_scored_label_stood_so_many_tokens_before() -> None:
    task = task_of(rows=4)
    assert task.distances == [16]
    scored = 0
    for batch in task.batches(0, 1):
        rows, labels = batch.rows_BW.astype(np.int64), batch.labels_BT.numpy()
        for row, label, sample in zip(rows, labels, batch.samples_B, strict=True):
            places = np.flatnonzero(label != IGNORE_LABEL)
            if sample < 0:
                assert not len(places)
                continue
            assert np.array_equal(places, np.arange(16, 64)) and np.array_equal(label[places], row[places + 1 - 16])
            assert len(np.unique(row[:16])) > 8
            scored += 1
    assert scored == 4


def test_a_model_that_sees_far_enough_knows_every_label_and_a_blind_one_none() -> None:
    task = task_of(distances=(4, 20), rows=5)
    far, near = evaluate(Engine(20), [task]), evaluate(Engine(4), [task])
    assert far["evaluation/repeats/accuracy_at_4"] == far["evaluation/repeats/accuracy_at_20"] == 1
    assert far["evaluation/repeats/loss_at_20"] == 0
    assert near["evaluation/repeats/accuracy_at_4"] == 1 > near["evaluation/repeats/accuracy_at_20"]
    assert near["evaluation/repeats/loss_at_20"] > 0.7 * math.log(97)


def test_ranks_share_the_rows_and_score_as_many_batches() -> None:
    task = task_of(distances=(4, 20), rows=5)
    parts = [[*task.batches(rank, 2)] for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    samples = np.concatenate([batch.samples_B for part in parts for batch in part])
    assert sorted(samples[samples >= 0]) == list(range(10))


def test_a_distance_that_no_row_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="stood so far before"):
        task_of(distances=(4, 64))
    assert RepeatsOptions(name="repeats", distances=(4, 4)).invalid([]) is not None
    assert RepeatsOptions(name="repeats", rows=0).invalid([]) is not None
