"""The input of a step: rows of ids, their labels and document borders."""

# B rows  T places of a row (`model.seq_len`)  W = T + 1
# Of the flattened B*T places: S segment borders  M masked places  R places that hold a token

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.packing import Layout
from kha_train.data.rows.ragged import runs


@dataclass(eq=False)
class Batch:
    """Rows of one rank for one optimiser step, or a part of them.

    `samples_B` (NumPy int64) are global sample numbers; -1 marks a filler row of padding. `rows_BW` holds the ids as
    stored (uint16 or uint32), each row with the id that follows its last token. `layout` has the ends of segments, the
    masked labels and the padding. The tensors below are made on first use.

    A place is padding when it holds no token of a document. A token with a masked label, such as the last one of its
    document, is an ordinary token: it is attended to and routed. `step_tokens` are the tokens of the whole global
    batch, once the ranks have agreed on them.

    With `part` (p, P) the batch is part p of P equal parts of every row, along its tokens: ids, labels, positions,
    counts and places are those of the part, borders of documents those of whole rows.
    """

    # Not frozen: that would cost 1/40 of the time of a small batch.

    samples_B: np.ndarray
    rows_BW: np.ndarray
    layout: Layout
    step_tokens: int | None = None
    part: tuple[int, int] = (0, 1)

    @property
    def own(self) -> slice:
        """The places of a row that belong to this part."""
        number, parts = self.part
        size = (self.rows_BW.shape[1] - 1) // parts
        return slice(number * size, (number + 1) * size)

    @cached_property
    def tokens_BT(self) -> torch.Tensor:
        """The ids, int64."""
        return torch.from_numpy(self.rows_BW[:, self.own].astype(np.int64))

    @cached_property
    def labels_BT(self) -> torch.Tensor:
        """The id after each token, int64; IGNORE_LABEL where masked."""
        labels_BT = self.rows_BW[:, 1:].astype(np.int64)
        labels_BT.reshape(-1)[self.layout.masked_M] = IGNORE_LABEL
        return torch.from_numpy(np.ascontiguousarray(labels_BT[:, self.own]))

    @cached_property
    def positions_BT(self) -> torch.Tensor:
        """int64: position within the segment."""
        borders_S = self.layout.borders_S
        starts = np.repeat(borders_S[:-1], np.diff(borders_S))
        positions = np.subtract(np.arange(len(starts)), starts, out=starts)
        return torch.from_numpy(np.ascontiguousarray(positions.reshape(len(self.rows_BW), -1)[:, self.own]))

    @cached_property
    def cu_seqlens_S(self) -> torch.Tensor:
        """int32: the segment borders over the flattened B*T tokens, from 0 to B*T, including every row start."""
        return torch.from_numpy(self.layout.borders_S.astype(np.int32))

    @cached_property
    def max_seqlen(self) -> int:
        """Length of the longest segment."""
        return int(np.diff(self.layout.borders_S).max())

    @property
    def label_count(self) -> int:
        """Number of unmasked labels."""
        if self.part == (0, 1):
            return int(self.layout.borders_S[-1]) - len(self.layout.masked_M)
        return int(np.count_nonzero(self.labels_BT.numpy() != IGNORE_LABEL))

    @cached_property
    def real_R(self) -> torch.Tensor | None:
        """int64: the places of the flattened B*T that hold a token, ascending; None when there is no padding.

        A training batch has them if any row of its dataset has padding, so that all ranks compute the same graph: ZeRO
        3 gathers weights in the order of its nodes.
        """
        filled_B, T = self._filled_B, self.own.stop - self.own.start
        return None if filled_B is None else torch.from_numpy(runs(np.arange(len(filled_B)) * T, filled_B))

    @property
    def token_count(self) -> int:
        """Number of tokens, without padding."""
        filled_B = self._filled_B
        return int(self.layout.borders_S[-1]) // self.part[1] if filled_B is None else int(filled_B.sum())

    @property
    def whole(self) -> Batch:
        """The same rows, undivided."""
        return Batch(self.samples_B, self.rows_BW, self.layout)

    @property
    def _filled_B(self) -> np.ndarray | None:
        """The places of this part that hold a token, at the beginning of each row."""
        filled_B = self.layout.filled_N
        return None if filled_B is None else np.clip(filled_B - self.own.start, 0, self.own.stop - self.own.start)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """The batch in parts of `size` rows, in order; the last part is smaller when `size` does not divide the
        rows.
        """
        T = self.rows_BW.shape[1] - 1
        for number, layout in enumerate(self.layout.parts(size, T)):
            rows = slice(number * size, (number + 1) * size)
            yield Batch(self.samples_B[rows], self.rows_BW[rows], layout, part=self.part)
