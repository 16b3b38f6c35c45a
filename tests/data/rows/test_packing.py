"""Rows and document borders, against brute force over whole documents."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.shards import ShardSet
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.best_fit import BestFitRows, pack_pieces
from kha_train.data.rows.packing import ConcatRows, RowGrid
from kha_train.errors import DataError

LENGTHS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=1, max_size=3)


def write(directory: Path, lengths: list[list[int]]) -> ShardSet:
    """Shards of documents of the given lengths; the ids number the tokens through all shards, from 1."""
    prepare(directory)
    first, entries, vocab = 1, [], sum(map(sum, lengths)) + 1
    for index, shard in enumerate(lengths):
        ends = first + np.cumsum([0, *shard])
        documents = [(np.arange(a, b), int(b - a)) for a, b in itertools.pairwise(ends)]
        entries.append(write_shard(directory, index, documents, vocab_size=vocab, dtype="uint16"))
        first = int(ends[-1])
    publish_dataset(
        directory,
        entries,
        TokenizerEntry("test", vocab, "0" * 64, None, {}, (1,) * vocab),
        dtype="uint16",
        corpus={},
    )
    return ShardSet.open(directory)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packing")


def batch_of(rows: ConcatRows | BestFitRows, numbers: list[int]) -> Batch:
    rows_N = np.asarray(numbers, dtype=np.int64)
    return Batch(rows_N, rows.read(rows_N).astype(np.int64), rows.layout(rows_N))


def document_of(lengths: list[list[int]]) -> list[int]:
    """The number of the document each id belongs to; no document for 0, which is padding, and after the last."""
    flat = [length for shard in lengths for length in shard]
    return [-1, *(number for number, length in enumerate(flat) for _ in range(length)), -2]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, T=st.integers(1, 16), isolate=st.booleans(), data=st.data())
def test_borders_labels_and_positions_equal_brute_force(scratch: Path, lengths, T: int, isolate: bool, data) -> None:
    rows = ConcatRows(write(scratch / "a", lengths), T, isolate)
    if rows.rows == 0:
        assert all(sum(shard) < T + 1 for shard in lengths)
        return
    chosen = data.draw(st.lists(st.integers(0, rows.rows - 1), min_size=1, max_size=4))
    batch, owner, borders = batch_of(rows, chosen), document_of(lengths), {0}
    for j in range(len(chosen)):
        tokens = batch.tokens_BT[j].tolist()
        assert tokens == list(range(tokens[0], tokens[0] + T))
        labels, positions = [], []
        for i, token in enumerate(tokens):
            goes_on = i > 0 and (not isolate or owner[token] == owner[token - 1])
            borders |= set() if goes_on else {j * T + i}
            positions.append(positions[-1] + 1 if goes_on else 0)
            labels.append(IGNORE_LABEL if isolate and owner[token] != owner[token + 1] else token + 1)
        assert batch.labels_BT[j].tolist() == labels
        assert batch.positions_BT[j].tolist() == positions
    assert batch.cu_seqlens_S.tolist() == sorted(borders | {len(chosen) * T})
    assert batch.max_seqlen == batch.cu_seqlens_S.diff().max()
    assert batch.label_count == (batch.labels_BT != IGNORE_LABEL).sum()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, T=st.integers(1, 5), isolate=st.booleans(), size=st.integers(1, 4), data=st.data())
def test_parts_of_a_batch_are_the_batch(scratch: Path, lengths, T: int, isolate: bool, size: int, data) -> None:
    """Also where every row is one segment and yet some labels are masked, as in rows of one token."""
    rows = ConcatRows(write(scratch / "d", lengths), T, isolate)
    if rows.rows == 0:
        return
    batch = batch_of(rows, data.draw(st.lists(st.integers(0, rows.rows - 1), min_size=1, max_size=6)))
    parts = list(batch.micro_batches(size))
    for name in ("tokens_BT", "labels_BT", "positions_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.label_count for part in parts) == batch.label_count == (batch.labels_BT != IGNORE_LABEL).sum()


def test_the_label_is_masked_when_a_document_ends_exactly_with_the_row(scratch: Path) -> None:
    batch = batch_of(ConcatRows(write(scratch / "b", [[3, 5]]), 3, True), [0])
    assert batch.labels_BT.tolist() == [[2, 3, IGNORE_LABEL]]
    assert batch.cu_seqlens_S.tolist() == [0, 3]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=8), T=st.integers(1, 10))
def test_every_token_but_the_tail_of_a_shard_is_in_exactly_one_row(tokens: list[int], T: int) -> None:
    grid = RowGrid(tokens, T)
    seen = [np.zeros(n, dtype=int) for n in tokens]
    shards_N, starts_N = grid.locate(np.arange(grid.rows))
    for shard, start in zip(shards_N.tolist(), starts_N.tolist(), strict=True):
        assert start + T + 1 <= tokens[shard]
        seen[shard][start : start + T] += 1
    for n, part in zip(tokens, seen, strict=True):
        used = int(part.sum())
        assert part[:used].tolist() == [1] * used and n - 1 - used < T


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, T=st.integers(1, 16))
def test_best_fit_loses_no_token_and_no_label_and_keeps_documents_whole(scratch: Path, lengths, T: int) -> None:
    rows = BestFitRows(write(scratch / "c", lengths), T, True, scratch / "tables")
    batch, owner = batch_of(rows, list(range(rows.rows))), document_of(lengths)
    borders = batch.cu_seqlens_S.tolist()
    tokens, labels = batch.tokens_BT.flatten().tolist(), batch.labels_BT.flatten().tolist()
    positions = batch.positions_BT.flatten().tolist()
    assert {i for i, position in enumerate(positions) if position == 0} == set(borders[:-1])
    seen: Counter[int] = Counter()
    for first, last in itertools.pairwise(borders):
        segment = tokens[first:last]
        if segment[0] == 0:
            assert set(segment) == {0} and set(labels[first:last]) == {IGNORE_LABEL}
            continue
        assert segment == list(range(segment[0], segment[-1] + 1))
        assert len({owner[token] for token in segment}) == 1
        seen.update(segment)
        goes_on = owner[segment[-1]] == owner[segment[-1] + 1]
        assert not goes_on or len(segment) == T, "only a document longer than a row is cut"
        assert labels[first:last] == [*segment[1:], segment[-1] + 1 if goes_on else IGNORE_LABEL]
    assert seen == Counter(range(1, len(owner) - 1))
    assert rows.padding == tokens.count(0)
    real = [place for place, token in enumerate(tokens) if token]
    assert batch.token_count == len(real)
    assert batch.real_R is None if len(real) == len(tokens) else batch.real_R.tolist() == real
    assert (batch.real_R is None) is (rows.padding == 0)
    for size in (1, 2):
        parts = list(batch.micro_batches(size))
        assert sum(part.token_count for part in parts) == len(real)
        for number, part in enumerate(parts):
            own = range(number * size * T, number * size * T + part.tokens_BT.numel())
            assert (part.real_R is None) is (rows.padding == 0), "ranks compute one graph"
            found = range(len(own)) if part.real_R is None else part.real_R.tolist()
            assert [own[place] for place in found] == [place for place in real if place in own]


@pytest.mark.parametrize("seed", [0, 1])
def test_best_fit_fills_rows_nearly_and_always_in_the_same_way(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(6, 1.2, 5000).astype(np.int64) + 1
    first, second = (pack_pieces(lengths, 4096) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    starts, sizes, _, counts = first
    assert lengths.sum() / (len(counts) * 4096) > 0.99
    order = np.argsort(starts)
    assert np.array_equal(np.cumsum(sizes[order])[:-1], starts[order][1:]) and starts.min() == 0
    row_sums = np.add.reduceat(sizes, np.concatenate(([0], np.cumsum(counts)[:-1])))
    assert row_sums.max() <= 4096


def rows_piece_by_piece(sizes: list[int], T: int) -> list[int]:
    """Best-fit decreasing in its plainest form: the tightest row, the one that was filled last among equals."""
    room, rows = [], []
    last_use: list[int] = []
    for number, size in enumerate(sizes):
        fitting = [row for row, left in enumerate(room) if left >= size]
        row = min(fitting, key=lambda row: (room[row], -last_use[row]), default=len(room))
        if row == len(room):
            room.append(T)
            last_use.append(number)
        room[row] -= size
        last_use[row] = number
        rows.append(row)
    return rows


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), T=st.integers(1, 40))
def test_pieces_of_one_size_laid_together_go_where_each_alone_would(lengths: list[int], T: int) -> None:
    starts, sizes, _, counts = pack_pieces(np.array(lengths), T)
    rows = np.repeat(np.arange(len(counts)), counts)
    # The order in which pieces are laid: descending, and as the documents come among equals.
    laid = sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], starts[piece]))
    assert rows[laid].tolist() == rows_piece_by_piece(sizes[laid].tolist(), T)


def test_damaged_ends_make_no_table_though_checksums_are_not_asked_for(small_dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_dataset / "train", tmp_path / "copy"))
    doc = copy / "shard-00000.doc"
    ends = np.fromfile(doc, dtype="<i8")
    longer = int(np.flatnonzero(np.diff(ends) > 1)[0])
    ends[longer] += 1
    ends.tofile(doc)
    with pytest.raises(DataError, match="shard-00000.doc.*CRC-32"):
        BestFitRows(ShardSet.open(copy, check_crc=False), 32, True, tmp_path / "tables")
    assert not list((tmp_path / "tables").glob("*/"))
