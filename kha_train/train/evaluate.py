"""Validation: cross-entropy and bits per byte on the first rows of the held-out text."""

# B batch  T tokens  V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.batch import Batch
from kha_train.data.sources import without_labels
from kha_train.distributed import World
from kha_train.engine.contract import Engine
from kha_train.errors import DataError
from kha_train.metric import Metric

METRICS = (
    Metric("validation/loss", "nats/token", "token cross-entropy on the validation rows / their unmasked labels"),
    Metric(
        "validation/bits_per_byte",
        "bits/byte",
        "validation cross-entropy in bits / bytes of text behind the unmasked labels; absent for ids imported without "
        "a tokenizer",
    ),
)


@dataclass(frozen=True)
class Validation:
    """`loss` is the mean cross-entropy in nats a label; `bits_per_byte` divides by the bytes those labels stand for. It
    is None for ids of which nobody knows the text (imported without a tokenizer)."""

    loss: float
    bits_per_byte: float | None

    def metrics(self) -> dict[str, float]:
        """The `validation/` entries of a line of the record."""
        known = {} if self.bits_per_byte is None else {"validation/bits_per_byte": self.bits_per_byte}
        return {"validation/loss": self.loss, **known}


def evaluate(engine: Engine, batches: Iterable[Batch], bytes_per_id_V: Tensor) -> Validation:
    """Score `batches` (this rank's part of the validation rows, equally many on every rank) and add up over ranks.

    Collective; waits for the device once, at the end. Raises DataError on all ranks when any rank could not read a
    batch, when there is no label, or when the labels stand for no text although other ids do.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.world.device)
    label_count, text_bytes = 0, 0
    for batch in _read_together(batches, engine.world):
        labels = batch.labels_BT[batch.labels_BT != IGNORE_LABEL]
        batch_loss = engine.evaluate(batch).loss_sum
        assert batch_loss is not None, "the batch has labels"
        loss_sum += batch_loss
        label_count += labels.numel()
        text_bytes += int(bytes_per_id_V[labels].sum())
        engine.world.alive()
    counts = torch.tensor([label_count, text_bytes], dtype=torch.float64, device=engine.world.device)
    loss, labels, text_bytes = engine.world.sum_(torch.cat((loss_sum.view(1), counts))).tolist()
    if not labels:
        raise _agreed(without_labels("data.validation", "no token"))
    if text_bytes:
        return Validation(loss / labels, loss / math.log(2) / text_bytes)
    if bytes_per_id_V.any():
        problem = f"its {int(labels)} labels stand for no text: all are control ids"
        raise _agreed(DataError(problem, field="data.validation", fix="validate on text"))
    return Validation(loss / labels, None)


def _agreed(error: DataError) -> DataError:
    """`error`, which follows from sums over all ranks: all of them raise it."""
    error.agreed = True
    return error


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
