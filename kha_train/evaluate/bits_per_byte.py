"""Cross-entropy and bits per byte of held-out rows: what validation is."""

# N unmasked labels of a batch  V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.batch import Batch
from kha_train.data.sources import without_labels
from kha_train.errors import DataError
from kha_train.evaluate.contract import RowTask, Scorer, Sums
from kha_train.metric import Metric
from kha_train.variants.task import RowTaskOptions


class BitsPerByte(RowTask[RowTaskOptions]):
    """`loss` is the mean cross-entropy in nats a label; `bits_per_byte` divides by the bytes those labels stand for. It
    is absent for ids of which nobody knows the text (imported without a tokenizer)."""

    of_labels = True
    metrics = (
        Metric("loss", "nats/token", "token cross-entropy on the validation rows / their unmasked labels"),
        Metric(
            "bits_per_byte",
            "bits/byte",
            "validation cross-entropy in bits / bytes of text behind the unmasked labels; absent for ids imported "
            "without a tokenizer",
        ),
    )

    def score(self, engine: Scorer, batch: Batch) -> Mapping[str, Tensor | float]:
        """See `Task.score`."""
        labels_N = batch.labels_BT[batch.labels_BT != IGNORE_LABEL]
        loss_sum = engine.evaluate(batch).loss_sum
        assert loss_sum is not None, "the batch has labels"
        return {
            "nats": loss_sum,
            "labels": labels_N.numel(),
            "bytes": int(self.rows.bytes_per_id_V[labels_N].sum()),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """See `Task.figures`. Raises DataError when there is no label, or when the labels stand for no text although
        other ids do."""
        nats, labels, text_bytes = (float(sums[name]) for name in ("nats", "labels", "bytes"))
        if not labels:
            raise without_labels(self.rows.field, "no token")
        if not text_bytes and self.rows.bytes_per_id_V.any():
            problem = f"its {int(labels)} labels stand for no text: all are control ids"
            raise DataError(problem, field=self.rows.field, fix="validate on text")
        known = {"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {}
        return {"loss": nats / labels, **known}
