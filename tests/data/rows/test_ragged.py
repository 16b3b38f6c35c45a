"""Runs of whole numbers, against Python's own ranges."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kha_train.data.rows.ragged import runs, spanned, sums_before

PAIRS = st.lists(st.tuples(st.integers(-(10**12), 10**12), st.integers(0, 20)), max_size=12)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([a for a, _ in pairs], dtype=np.int64), np.array([b for _, b in pairs], dtype=np.int64)


@given(pairs=PAIRS)
def test_runs_are_ranges_laid_end_to_end(pairs: list[tuple[int, int]]) -> None:
    found = runs(*columns(pairs))
    assert found.dtype == np.int64
    assert found.tolist() == [number for start, count in pairs for number in range(start, start + count)]


@given(pairs=PAIRS)
def test_spanned_is_the_union_of_ranges_with_both_their_ends(pairs: list[tuple[int, int]]) -> None:
    first_N, more_N = columns(pairs)
    union = {number for start, more in pairs for number in range(start, start + more + 1)}
    assert spanned(first_N, first_N + more_N).tolist() == sorted(union)


def test_sums_before_end_with_the_sum_of_all() -> None:
    assert sums_before(np.array([3, 0, 5])).tolist() == [0, 3, 3, 8]
    assert sums_before(np.array([], dtype=np.int64)).tolist() == [0]
