"""The sample order: a permutation, the same everywhere, computed in place."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.data.sampling.order import BLOCK, SUPER_BLOCK, BlockPermutation, Permutation, SampleOrder
from kha_train.errors import DataError

MASK = (1 << 64) - 1
GOLDEN_17 = [5, 10, 9, 15, 0, 16, 2, 13, 6, 14, 8, 7, 1, 4, 11, 12, 3]
GOLDEN_FAR = [130797958897, 542328075224, 511551347540]


def plain_row(position: int, n: int, seed: int, source: str, epoch: int) -> int:
    """The permutation of docs/data.md in Python integers, one position at a time."""
    text = json.dumps(
        {"algorithm": "mixed-radix-feistel-1", "epoch": epoch, "n": n, "rounds": 6, "seed": seed, "source": source},
        separators=(",", ":"),
    )
    digest = hashlib.blake2b(text.encode(), digest_size=48).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(6)]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def mix(x: int, key: int) -> int:
        z = (x * 0x9E3779B97F4A7C15 + key) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    x = position
    while True:
        left, right = divmod(x, b)
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + mix(right, key)) % a
            else:
                right = (right + mix(left, key)) % b
        x = left * b + right
        if x < n:
            return x


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 1000, 48_824, 1_000_003])
def test_every_row_comes_once(n: int) -> None:
    permutation = Permutation(n, seed=3, source="train", epoch=2)
    positions = np.arange(n)
    rows = permutation.forward(positions)
    assert np.array_equal(np.sort(rows), positions)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 10**15), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), data=st.data())
def test_the_vectorised_order_is_the_formula_of_the_documentation(n: int, seed: int, epoch: int, data) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    rows = Permutation(n, seed=seed, source="s", epoch=epoch).forward(np.asarray(positions))
    assert rows.tolist() == [plain_row(p, n, seed, "s", epoch) for p in positions]


def test_golden_rows_never_change() -> None:
    rows = Permutation(17, seed=0, source="train", epoch=0).forward(np.arange(17)).tolist()
    assert rows == GOLDEN_17
    far = Permutation(10**12, seed=7, source="train", epoch=1).forward(np.array([0, 1, 10**12 - 1])).tolist()
    assert far == GOLDEN_FAR


def test_python_and_numpy_integers_give_one_order() -> None:
    plain = Permutation(1000, seed=5, source="train", epoch=1).forward(np.arange(1000))
    numpy = Permutation(np.int64(1000), seed=np.int32(5), source="train", epoch=np.int64(1)).forward(np.arange(1000))
    assert np.array_equal(plain, numpy)


def test_seed_epoch_source_and_size_each_change_the_order() -> None:
    base = {"n": 1000, "seed": 0, "source": "train", "epoch": 0}
    variants = [base, {**base, "seed": 1}, {**base, "epoch": 1}, {**base, "source": "code"}]
    orders = [tuple(Permutation(**variant).forward(np.arange(1000)).tolist()) for variant in variants]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("position", [-1, 1000, 1500, 2**62])
def test_a_position_outside_the_dataset_is_refused(position: int) -> None:
    with pytest.raises(DataError):
        Permutation(1000, seed=0, source="train", epoch=0).forward(np.array([position]))


def test_an_empty_dataset_cannot_be_ordered() -> None:
    with pytest.raises(DataError):
        SampleOrder(0, seed=0, source="train")


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9000), first=st.integers(0, 40_000), count=st.integers(0, 10_000))
def test_cached_blocks_give_the_samples_one_by_one(n: int, first: int, count: int) -> None:
    order = SampleOrder(n, seed=1, source="train")
    rows = order.rows(first, count)
    assert len(rows) == count
    for offset in {0, count // 2, count - 1} & set(range(count)):
        epoch, position = divmod(first + offset, n)
        assert rows[offset] == Permutation(n, seed=1, source="train", epoch=epoch).forward(np.array([position]))[0]


def test_an_epoch_holds_every_row_once_and_the_next_one_is_another_order() -> None:
    order = SampleOrder(5000, seed=1, source="train")
    first, second = order.rows(0, 5000), order.rows(5000, 5000)
    assert sorted(first) == sorted(second) == list(range(5000))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 4095, 4096, 10_000, 50_001])
def test_the_block_shuffle_gives_every_row_once_and_reads_in_runs(n: int) -> None:
    rows = BlockPermutation(n, seed=1, source="far", epoch=0).forward(np.arange(n))
    assert np.array_equal(np.sort(rows), np.arange(n))
    whole = n // SUPER_BLOCK * SUPER_BLOCK
    for first in range(0, whole, BLOCK):
        window = rows[first : min(first + BLOCK, whole)]
        assert len(np.unique(window // SUPER_BLOCK)) == len(window) // SUPER_BLOCK
    assert set(rows[whole:]) == set(range(whole, n))
    again = SampleOrder(n, seed=1, source="far", shuffle="block").rows(0, n)
    assert np.array_equal(again, rows)
