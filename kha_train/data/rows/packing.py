"""Rows of equal length cut from shards, and the document borders inside them.

`concat` concatenates and chunks: rows have L + 1 tokens at stride L, so that row i's tokens are [iL, iL + L) and its
labels [iL + 1, iL + L + 1). A row never crosses a shard, and the lost tail is shorter than a row. There is no padding.
"""

# T tokens of a row (`seq_len`)  W = T + 1, a row with the label of its last token
# N rows of any number  S segment borders of the flattened rows  M masked places of the flattened rows

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from kha_train.data.format.shards import ShardSet


class Layout(NamedTuple):
    """The documents in N rows laid end to end. `borders_S`, from 0 to N*T with every row start included, are the ends
    of segments. `masked_M` are the places whose label is masked. Both are ascending int64. `filled_N` (int64) is the
    number of tokens in each row; the rest of the row is padding. None: no row has padding, on any rank.
    """

    borders_S: np.ndarray
    masked_M: np.ndarray
    filled_N: np.ndarray | None = None

    def parts(self, size: int, T: int) -> Iterator[Layout]:
        """The layouts of each `size` rows, separately; the last part may be smaller."""
        total = int(self.borders_S[-1])
        if (len(self.borders_S) - 1) * T == total and not len(self.masked_M):
            # Rows with one segment each: every part looks like the first.
            rows = total // T
            yield from repeat(self._beginning(size), rows // size)
            if rows % size:
                yield self._beginning(rows % size)
            return
        cuts = np.append(np.arange(0, total, size * T), total)
        starts = np.searchsorted(self.masked_M, cuts).tolist()
        borders, places = np.searchsorted(self.borders_S, cuts).tolist(), cuts.tolist()
        for i, place in enumerate(places[:-1]):
            masked_M = self.masked_M[starts[i] : starts[i + 1]]
            filled_N = None if self.filled_N is None else self.filled_N[i * size : (i + 1) * size]
            yield Layout(self.borders_S[borders[i] : borders[i + 1] + 1] - place, masked_M - place, filled_N)

    def _beginning(self, rows: int) -> Layout:
        filled_N = None if self.filled_N is None else self.filled_N[:rows]
        return Layout(self.borders_S[: rows + 1], self.masked_M, filled_N)


class RowGrid:
    """The rows of `seq_len` tokens in shards of the given sizes, numbered across shards."""

    def __init__(self, tokens_of_shards: Sequence[int], seq_len: int) -> None:
        assert seq_len >= 1, seq_len
        self.seq_len = seq_len
        rows = [max(0, tokens - 1) // seq_len for tokens in tokens_of_shards]
        self._starts = np.cumsum(np.asarray([0, *rows], dtype=np.int64))
        self.rows = int(self._starts[-1])

    def locate(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token in it) of rows, both int64."""
        shards_N = self._starts.searchsorted(rows_N, side="right") - 1
        return shards_N, (rows_N - self._starts[shards_N]) * self.seq_len


class ConcatRows:
    """The rows of a dataset under `concat`, by number: `rows` of them, of `seq_len` tokens."""

    def __init__(self, shards: ShardSet, seq_len: int, isolate_documents: bool) -> None:
        self.shards, self._isolate = shards, isolate_documents
        self._grid = RowGrid([shard.tokens for shard in shards.manifest.shards], seq_len)
        self.rows, self.seq_len = self._grid.rows, seq_len

    def layout(self, rows_N: np.ndarray) -> Layout:
        """Borders and masked labels of rows. Isolated: a segment is the part of a document inside one row, and the last
        token of a document predicts nothing, even if the document ends exactly with the row. Otherwise the row is one
        segment. Raises DataError when the document ends are damaged.
        """
        T = self.seq_len
        row_ends = np.arange(len(rows_N) + 1, dtype=np.int64) * T
        if not self._isolate:
            return Layout(row_ends, np.empty(0, dtype=np.int64))
        ends = self.shards.ends_in_rows(*self._grid.locate(rows_N), T)
        # Two ascending runs, merged by a stable sort.
        borders = np.sort(np.concatenate((row_ends, ends)), kind="stable")
        return Layout(borders[np.diff(borders, prepend=-1) > 0], ends - 1)

    def expect(self, plans: Sequence[np.ndarray]) -> None:
        """Announce all upcoming rows, plan by plan, in order."""
        pieces = [(*self._grid.locate(rows_N), np.full(len(rows_N), self.seq_len + 1)) for rows_N in plans]
        self.shards.expect(pieces, ends=self._isolate)

    def read(self, rows_N: np.ndarray) -> np.ndarray:
        """The ids of rows, [N, T + 1] in the dataset's dtype. Raises DataError when they are damaged."""
        return next(self.read_in_parts(rows_N, (0, len(rows_N))))

    def read_in_parts(self, rows_N: np.ndarray, bounds: Sequence[int]) -> Iterator[np.ndarray]:
        """As `read`, one part at a time as requested: part k has rows [bounds[k], bounds[k + 1])."""
        lengths_N = np.full(len(rows_N), self.seq_len + 1)
        return map(self._as_rows, self.shards.gather_in_parts(*self._grid.locate(rows_N), lengths_N, bounds))

    def _as_rows(self, ids: np.ndarray) -> np.ndarray:
        return ids.reshape(-1, self.seq_len + 1)
