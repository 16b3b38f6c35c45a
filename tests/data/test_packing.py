"""Rows and document borders, against brute force over whole documents."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.packing import RowGrid, pack


def brute_force(lengths: list[int], start: int, T: int, isolate: bool) -> tuple[list, list, list, list]:
    """Walk token by token: (tokens, labels, positions, borders) of the row of T tokens at `start`."""
    document_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    tokens, labels, positions, borders = [], [], [], []
    for i in range(T):
        same = i > 0 and (not isolate or document_of[start + i] == document_of[start + i - 1])
        if not same:
            borders.append(i)
        tokens.append(start + i)
        positions.append(positions[-1] + 1 if same else 0)
        crosses = document_of[start + i] != document_of[start + i + 1]
        labels.append(IGNORE_LABEL if isolate and crosses else start + i + 1)
    return tokens, labels, positions, [*borders, T]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    T=st.integers(1, 16),
    isolate=st.booleans(),
    data=st.data(),
)
def test_borders_labels_and_positions_equal_brute_force(lengths: list[int], T: int, isolate: bool, data) -> None:
    total = sum(lengths)
    grid = RowGrid([total], T)
    if grid.rows == 0:
        assert total < T + 1
        return
    chosen = data.draw(st.lists(st.integers(0, grid.rows - 1), min_size=1, max_size=4))
    all_ends = np.cumsum(lengths)
    starts = [grid.locate(row)[1] for row in chosen]
    rows = np.stack([np.arange(start, start + T + 1) for start in starts])
    ends = [all_ends[(all_ends > start) & (all_ends <= start + T)] - start for start in starts]
    packed = pack(rows, ends, isolate_documents=isolate)
    borders = {0}
    for j, start in enumerate(starts):
        tokens, labels, positions, row_borders = brute_force(lengths, start, T, isolate)
        assert packed.tokens_BT[j].tolist() == tokens
        assert packed.labels_BT[j].tolist() == labels
        assert packed.positions_BT[j].tolist() == positions
        borders |= {j * T + border for border in row_borders}
    assert packed.cu_seqlens_S.tolist() == sorted(borders)
    assert packed.cu_seqlens_S.dtype == np.int32


def test_the_label_is_masked_when_a_document_ends_exactly_with_the_row() -> None:
    packed = pack(np.array([[1, 2, 3, 9]]), [np.array([3])], isolate_documents=True)
    assert packed.labels_BT.tolist() == [[2, 3, IGNORE_LABEL]]
    assert packed.cu_seqlens_S.tolist() == [0, 3]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=8), T=st.integers(1, 10))
def test_every_token_but_the_tail_of_a_shard_is_in_exactly_one_row(tokens: list[int], T: int) -> None:
    grid = RowGrid(tokens, T)
    seen = np.concatenate([np.zeros(n, dtype=int) for n in tokens])
    offsets = np.cumsum([0, *tokens])
    for row in range(grid.rows):
        shard, start = grid.locate(row)
        assert start + T + 1 <= tokens[shard]
        seen[offsets[shard] + start : offsets[shard] + start + T] += 1
    for shard, n in enumerate(tokens):
        part = seen[offsets[shard] : offsets[shard + 1]]
        used = int(part.sum())
        assert part[:used].tolist() == [1] * used and n - 1 - used < T
