"""Validation: cross-entropy and bits per byte on held-out text, the same rows in every run."""

# B batch  T tokens  V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.stream import Batch
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine


@dataclass(frozen=True)
class Validation:
    """`loss` is the mean cross-entropy in nats a label; `bits_per_byte` divides by the bytes those labels stand for."""

    loss: float
    bits_per_byte: float


def evaluate(engine: Engine, batches: Iterable[Batch], bytes_per_id_V: Tensor) -> Validation:
    """Score `batches` (this rank's part of the validation rows, equally many on every rank) and add up over ranks.

    Collective; waits for the device once, at the end. Raises DataError on all ranks when any rank could not read a
    batch.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.world.device)
    label_count, text_bytes = 0, 0
    for batch in _read_together(batches, engine.world):
        labels = batch.labels_BT[batch.labels_BT != IGNORE_LABEL]
        loss_sum += engine.evaluate(batch).loss_sum
        label_count += labels.numel()
        text_bytes += int(bytes_per_id_V[labels].sum())
        engine.world.alive()
    counts = torch.tensor([label_count, text_bytes], dtype=torch.float64, device=engine.world.device)
    loss, labels, text_bytes = engine.world.sum_(torch.cat((loss_sum.view(1), counts))).tolist()
    bits_per_byte = loss / math.log(2) / text_bytes if text_bytes else math.nan  # imported ids without a tokenizer
    return Validation(loss / max(labels, 1), bits_per_byte)


def _read_together(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches; before each is used, all ranks know that all have read theirs."""
    remaining = iter(batches)
    while True:
        batch = None
        with world.agreed():
            batch = next(remaining, None)
        if batch is None:
            return
        yield batch
