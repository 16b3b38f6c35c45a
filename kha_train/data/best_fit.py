"""Rows that keep documents whole: best-fit decreasing (the idea: arXiv 2404.10830).

Documents longer than a row are cut into pieces of T tokens and a rest; every other document is one piece. Pieces are
laid into rows from the longest to the shortest, each into the row with the least room that still holds it. What room
remains is padding, its labels masked. No token is lost and none comes twice. Pieces never leave their shard.

The table of pieces is a pure function of the document lengths and T: seconds for a million documents, 24 bytes a piece.
It is made once, by one process, kept in a directory named by the content it was made of, and memory-mapped.
"""

# N rows  P pieces of those rows  T tokens of a row  W = T + 1, a row with the label of its last token  M masked places

from __future__ import annotations

from pathlib import Path

import numpy as np

from kha_train.data.canonical import canonical_sha256
from kha_train.data.kept import kept_arrays
from kha_train.data.packing import Layout
from kha_train.data.shards import ShardSet

ALGORITHM = "best-fit-decreasing-1"


class BestFitRows:
    """The rows of a dataset under `best_fit`, by number: `rows` of them, of `seq_len` tokens.

    `padding` counts the places of all rows that hold no token. The table is kept in `cache`. Raises DataError when
    document ends are damaged, MachineError when the table cannot be written.
    """

    def __init__(self, shards: ShardSet, seq_len: int, isolate_documents: bool, cache: Path) -> None:
        assert isolate_documents, "best_fit rows hold unrelated documents side by side"
        self.shards, self.seq_len = shards, seq_len
        identity = [ALGORITHM, shards.content_id, seq_len]
        kept = kept_arrays(cache / f"best-fit-{canonical_sha256(identity)}", lambda: _table(shards, seq_len))
        self._starts, self._lengths, self._closed = kept["pieces"]
        self._offsets, self._shard_of_row = kept["offsets"], kept["shards"]
        self.rows = len(self._offsets) - 1
        self.padding = self.rows * seq_len - shards.manifest.tokens

    def layout(self, rows_N: np.ndarray) -> Layout:
        """Borders and masked labels: the last token of a document and padding predict nothing."""
        T = self.seq_len
        row_ends = np.arange(len(rows_N) + 1, dtype=np.int64) * T
        borders, masked = [row_ends], []
        for j, row in enumerate(rows_N.tolist()):
            pieces = slice(self._offsets[row], self._offsets[row + 1])
            ends = j * T + np.cumsum(self._lengths[pieces])
            borders.append(ends)
            masked += [ends[self._closed[pieces] == 1] - 1, np.arange(ends[-1], (j + 1) * T)]
        masked_M = np.concatenate(masked) if masked else np.empty(0, dtype=np.int64)
        return Layout(np.unique(np.concatenate(borders)), masked_M)

    def expect(self, rows_N: np.ndarray) -> None:
        """All rows that are known to be read, in their order."""
        counts = self._offsets[rows_N + 1] - self._offsets[rows_N]
        pieces = np.arange(int(counts.sum())) + np.repeat(self._offsets[rows_N] - np.cumsum(counts) + counts, counts)
        shards_P = np.repeat(self._shard_of_row[rows_N], counts)
        self.shards.expect(shards_P, self._starts[pieces], self._lengths[pieces], ends=False)

    def read(self, rows_N: np.ndarray) -> np.ndarray:
        """The ids of rows, [N, T + 1] in the dataset's dtype, padding 0. Raises DataError when they are damaged."""
        rows_NW = np.zeros((len(rows_N), self.seq_len + 1), dtype=self.shards.dtype)
        for row_W, row in zip(rows_NW, rows_N.tolist(), strict=True):
            at, shard = 0, int(self._shard_of_row[row])
            for piece in range(self._offsets[row], self._offsets[row + 1]):
                # A piece of a document that goes on brings the label of its last token.
                count = int(self._lengths[piece]) + (0 if self._closed[piece] else 1)
                row_W[at : at + count] = self.shards.read(shard, int(self._starts[piece]), count)
                at += int(self._lengths[piece])
        return rows_NW


def _table(shards: ShardSet, T: int) -> dict[str, np.ndarray]:
    """`pieces` [3, pieces]: first token, tokens, 1 where the document ends; `offsets`: the first piece of each row, and
    their number; `shards`: the shard of each row."""
    tables = [pack_pieces(lengths, T) for lengths in shards.document_lengths()]
    counts = [np.asarray(table[3], dtype=np.int64) for table in tables]
    return {
        "pieces": np.concatenate([np.stack(table[:3]).astype(np.int64) for table in tables], axis=1),
        "offsets": np.concatenate(([0], np.cumsum(np.concatenate(counts)))),
        "shards": np.repeat(np.arange(len(counts)), [len(c) for c in counts]),
    }


def pack_pieces(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """The pieces of documents of the given `lengths`, row by row: (first token, tokens, ends its document), and how
    many pieces each row has."""
    starts, sizes, closed = _cut(lengths, T)
    order = np.argsort(-sizes, kind="stable")
    rows = _fill(sizes[order], T)
    by_row = np.argsort(rows, kind="stable")
    picked = order[by_row]
    return starts[picked], sizes[picked], closed[picked], np.bincount(rows).tolist()


def _cut(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents as pieces of at most T tokens, in order: (first token, tokens, whether the document ends there)."""
    pieces = -(-lengths // T)
    ends = np.cumsum(lengths)
    last = np.cumsum(pieces) - 1
    within = np.arange(int(pieces.sum())) - np.repeat(last + 1 - pieces, pieces)
    starts = np.repeat(ends - lengths, pieces) + within * T
    closed = np.zeros(len(starts), dtype=bool)
    closed[last] = True
    return starts, np.minimum(T, np.repeat(ends, pieces) - starts), closed


def _fill(sizes: np.ndarray, T: int) -> np.ndarray:
    """The row of each piece, sizes descending: the row with the least sufficient room, the one that got it
    last among equals, a new one when none has room."""
    room: list[list[int]] = [[] for _ in range(T + 1)]
    has_room = 0  # bit r: a row with exactly r places left
    rows = np.empty(len(sizes), dtype=np.int64)
    opened = 0
    for piece, size in enumerate(sizes.tolist()):
        fitting = has_room >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                has_room &= ~(1 << left)
        else:
            row, left, opened = opened, T, opened + 1
        rows[piece] = row
        if left > size:
            room[left - size].append(row)
            has_room |= 1 << (left - size)
    return rows
