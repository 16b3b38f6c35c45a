"""Rows of equal length cut from shards, and the document borders inside them.

Concatenate and chunk: rows have L + 1 tokens at stride L, so that row i's tokens are [iL, iL + L) and its labels
[iL + 1, iL + L + 1). A row never crosses a shard; the tail lost is shorter than a row. No padding, nothing dropped.
"""

# B rows of a batch  T tokens of a row (`seq_len`)  S segment borders of the flattened batch

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kha_train.config.constants import IGNORE_LABEL


class RowGrid:
    """The rows of `seq_len` tokens that shards of the given sizes hold, numbered across shards."""

    def __init__(self, tokens_of_shards: Sequence[int], seq_len: int) -> None:
        assert seq_len >= 1, seq_len
        self.seq_len = seq_len
        rows = [max(0, tokens - 1) // seq_len for tokens in tokens_of_shards]
        self._ends = np.cumsum(np.asarray(rows, dtype=np.int64))
        self.rows = int(self._ends[-1]) if rows else 0

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, first token inside it) of a row."""
        assert 0 <= row < self.rows, (row, self.rows)
        shard = int(np.searchsorted(self._ends, row, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return shard, (row - before) * self.seq_len


class PackedRows(NamedTuple):
    """Rows with their borders: `labels_BT` and `positions_BT` int64, `cu_seqlens_S` int32 over the flattened B*T."""

    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    positions_BT: np.ndarray
    cu_seqlens_S: np.ndarray


def pack(rows: np.ndarray, ends: Sequence[np.ndarray], *, isolate_documents: bool) -> PackedRows:
    """Labels, positions and segment borders of `rows` [B, T + 1] (int64).

    `ends[j]` are row j's exclusive document ends relative to its first token, in (0, T]. Isolated: a segment is the
    part of one document inside one row, positions count from its start, and the last token of a document predicts
    nothing (IGNORE_LABEL), also when the document ends exactly with the row. Otherwise the row is one segment.
    """
    B, T = rows.shape[0], rows.shape[1] - 1
    labels_BT = rows[:, 1:].copy()
    borders = [np.arange(B + 1, dtype=np.int64) * T]
    if isolate_documents and B:
        flat_ends = np.concatenate([relative + j * T for j, relative in enumerate(ends)]).astype(np.int64)
        labels_BT.reshape(-1)[flat_ends - 1] = IGNORE_LABEL
        borders.append(flat_ends)
    cu_seqlens_S = np.unique(np.concatenate(borders))
    starts = np.repeat(cu_seqlens_S[:-1], np.diff(cu_seqlens_S))
    positions_BT = (np.arange(B * T, dtype=np.int64) - starts).reshape(B, T)
    return PackedRows(rows[:, :-1], labels_BT, positions_BT, cu_seqlens_S.astype(np.int32))
