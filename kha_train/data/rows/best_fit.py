"""Rows that keep documents whole: best-fit decreasing (the idea: arXiv 2404.10830).

Documents longer than a row are cut into pieces of T tokens and a rest; every other document is one piece. Pieces are
placed into rows from the longest to the shortest, each into the row with the least sufficient room. Remaining places
are padding with masked labels. No token is lost or repeated. Pieces never leave their shard.

The table of pieces is a pure function of the document lengths and T: it takes seconds for a million documents and 24
bytes per piece. One process makes it once; it is kept in a directory named after its content, and memory-mapped.
"""

# N rows  P pieces of those rows  T tokens of a row  W = T + 1, a row with the label of its last token  M masked places
# S borders of segments

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from kha_train.data.format.canonical import canonical_sha256
from kha_train.data.format.shards import ShardSet
from kha_train.data.kept import kept_arrays
from kha_train.data.rows.packing import Layout
from kha_train.data.rows.ragged import runs, sums_before

ALGORITHM = "best-fit-decreasing-1"
ARRAYS = ("pieces", "offsets", "shards")
"""The arrays of the stored table."""


class BestFitRows:
    """The rows of a dataset under `best_fit`, by number: `rows` of them, of `seq_len` tokens.

    `padding` counts the places of all rows without a token. The table is stored in `cache`. Raises DataError when
    document ends are damaged, MachineError when the table cannot be written.
    """

    def __init__(self, shards: ShardSet, seq_len: int, isolate_documents: bool, cache: Path) -> None:
        assert isolate_documents, "best_fit rows hold unrelated documents side by side"
        self.shards, self.seq_len = shards, seq_len
        identity = [ALGORITHM, shards.content_id, seq_len]
        kept = kept_arrays(cache / f"best-fit-{canonical_sha256(identity)}", lambda: _table(shards, seq_len), ARRAYS)
        self._starts, self._lengths, self._closed = kept["pieces"]
        self._offsets, self._shard_of_row = kept["offsets"], kept["shards"]
        self.rows = len(self._offsets) - 1
        self.padding = self.rows * seq_len - shards.manifest.tokens

    def layout(self, rows_N: np.ndarray) -> Layout:
        """Borders, masked labels and filled places: the last token of a document and padding predict nothing."""
        T = self.seq_len
        pieces_P, counts_N = self._pieces_of(rows_N)
        row_starts = np.arange(len(rows_N) + 1, dtype=np.int64) * T
        ends_P, filled_N = self._laid_out(pieces_P, counts_N)
        ends_P += np.repeat(row_starts[:-1], counts_N)
        padding_M = runs(row_starts[:-1] + filled_N, T - filled_N)
        masked_M = np.concatenate((ends_P[self._closed[pieces_P] == 1] - 1, padding_M))
        borders_S = np.unique(np.concatenate((row_starts, ends_P)))
        return Layout(borders_S, np.sort(masked_M, kind="stable"), filled_N if self.padding else None)

    def expect(self, plans: Sequence[np.ndarray]) -> None:
        """Announce all upcoming rows, plan by plan, in order."""
        pieces = []
        for rows_N in plans:
            pieces_P, counts_N = self._pieces_of(rows_N)
            shards_P = np.repeat(self._shard_of_row[rows_N], counts_N)
            pieces.append((shards_P, self._starts[pieces_P], self._lengths[pieces_P]))
        self.shards.expect(pieces, ends=False)

    def read(self, rows_N: np.ndarray) -> np.ndarray:
        """The ids of rows, [N, T + 1] in the dataset's dtype, with padding 0. Raises DataError when they are
        damaged.
        """
        return next(self.read_in_parts(rows_N, (0, len(rows_N))))

    def read_in_parts(self, rows_N: np.ndarray, bounds: Sequence[int]) -> Iterator[np.ndarray]:
        """As `read`, one part at a time as requested: part k has rows [bounds[k], bounds[k + 1])."""
        pieces_P, counts_N = self._pieces_of(rows_N)
        # A document that continues fills its row, and includes the label of its last token.
        lengths_P = self._lengths[pieces_P] + (1 - self._closed[pieces_P])
        shards_P, first_pieces = np.repeat(self._shard_of_row[rows_N], counts_N), sums_before(counts_N)
        held_N = np.diff(sums_before(lengths_P)[first_pieces])
        parts = self.shards.gather_in_parts(
            shards_P, self._starts[pieces_P], lengths_P, first_pieces[np.asarray(bounds)].tolist()
        )
        for first, last in pairwise(bounds):
            yield self._padded(next(parts), held_N[first:last])

    def _padded(self, ids: np.ndarray, held_N: np.ndarray) -> np.ndarray:
        """Rows from the ids: row j takes the next `held_N[j]` of them."""
        rows_NW = np.zeros((len(held_N), self.seq_len + 1), dtype=self.shards.dtype)
        ends = np.cumsum(held_N).tolist()
        for row_W, begin, end in zip(rows_NW, [0, *ends], ends, strict=False):
            row_W[: end - begin] = ids[begin:end]
        return rows_NW

    def _pieces_of(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of rows, row by row, and the number of pieces in each."""
        first_N = self._offsets[rows_N]
        counts_N = self._offsets[rows_N + 1] - first_N
        return runs(first_N, counts_N), counts_N

    def _laid_out(self, pieces_P: np.ndarray, counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The end of each piece in its row, and the number of tokens of each row."""
        sums = sums_before(self._lengths[pieces_P])
        before_N = sums[sums_before(counts_N)]
        return sums[1:] - np.repeat(before_N[:-1], counts_N), np.diff(before_N)


def _table(shards: ShardSet, T: int) -> dict[str, np.ndarray]:
    """`pieces` [3, pieces]: first token, tokens, 1 where the document ends; `offsets`: the first piece of each row, and
    the total number; `shards`: the shard of each row.
    """
    tables = [pack_pieces(lengths, T) for lengths in shards.document_lengths()]
    counts = [np.asarray(table[3], dtype=np.int64) for table in tables]
    return {
        "pieces": np.concatenate([np.stack(table[:3]).astype(np.int64) for table in tables], axis=1),
        "offsets": np.concatenate(([0], np.cumsum(np.concatenate(counts)))),
        "shards": np.repeat(np.arange(len(counts)), [len(c) for c in counts]),
    }


def pack_pieces(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """The pieces of documents of the given `lengths`, row by row: (first token, tokens, whether the document ends), and
    the number of pieces in each row.
    """
    starts, sizes, closed = _cut(lengths, T)
    order = np.argsort(-sizes, kind="stable")
    rows = _fill(sizes[order], T)
    by_row = np.argsort(rows, kind="stable")
    picked = order[by_row]
    return starts[picked], sizes[picked], closed[picked], np.bincount(rows).tolist()


def _cut(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most T tokens, in order: (first token, tokens, whether the document ends
    there).
    """
    pieces = -(-lengths // T)
    ends = np.cumsum(lengths)
    last = np.cumsum(pieces) - 1
    within = np.arange(int(pieces.sum())) - np.repeat(last + 1 - pieces, pieces)
    starts = np.repeat(ends - lengths, pieces) + within * T
    closed = np.zeros(len(starts), dtype=bool)
    closed[last] = True
    return starts, np.minimum(T, np.repeat(ends, pieces) - starts), closed


def _fill(sizes: np.ndarray, T: int) -> np.ndarray:
    """The row of each piece, with sizes descending: the row with the least sufficient room, the most recently used one
    among equals, or a new one.

    Pieces of one size are placed together. The row with the least sufficient room takes as many of them as fit, because
    its remaining room is then smaller than that of any other row that still fits one. So the cost grows with the number
    of sizes.
    """
    room: list[list[int]] = [[] for _ in range(T + 1)]
    has_room = 0  # bit r is set if some row has exactly r free places
    parts, opened = [np.empty(0, dtype=np.int64)], 0
    for size, count in zip(*_counted(sizes), strict=True):
        while count:
            fitting = has_room >> size
            left = size + (fitting & -fitting).bit_length() - 1 if fitting else T
            each = left // size
            wanted = -(-count // each)
            if fitting:
                taken = room[left][: -wanted - 1 : -1]
                del room[left][-wanted:]
                has_room &= ~(0 if room[left] else 1 << left)
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            laid = min(count, each * len(taken))
            parts.append(np.repeat(taken, each)[:laid])
            count -= laid
            in_last = laid - each * (len(taken) - 1)
            for rows, rest in ((taken[:-1], left - each * size), (taken[-1:], left - in_last * size)):
                if rows and rest:
                    room[rest] += rows
                    has_room |= 1 << rest
    return np.concatenate(parts)


def _counted(sizes: np.ndarray) -> tuple[list[int], list[int]]:
    """The distinct values of descending `sizes`, and their counts."""
    values, counts = np.unique(sizes, return_counts=True)
    return values[::-1].tolist(), counts[::-1].tolist()
