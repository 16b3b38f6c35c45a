"""Mixtures: every source continues without gap or repeat, shares are exact, any sample is found directly."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.data.sampling.mixture import UNITS, Mixture, Phase
from kha_train.errors import ConfigError

WEIGHTS = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6)


def dealt(mixture: Mixture, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    return mixture.samples(0, blocks * mixture.slots)


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**31))
def test_every_source_gives_its_samples_in_order_without_gap_or_repeat(weights: list[float], seed: int) -> None:
    mixture = Mixture([Phase(0, tuple(weights))], seed=seed)
    sources_N, numbers_N = dealt(mixture, 2)
    for source in range(len(weights)):
        own = numbers_N[sources_N == source]
        assert np.array_equal(own, np.arange(len(own)))


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, block=st.integers(0, 10**12))
def test_counts_are_within_one_of_the_share_at_every_block_end(weights: list[float], block: int) -> None:
    mixture = Mixture([Phase(0, tuple(weights))], seed=0)
    n = block * mixture.slots
    counts = mixture.counts(block)
    assert sum(counts) == n
    for count, share in zip(counts, mixture.shares, strict=True):
        assert abs(count - Fraction(share) * n) < 1
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert abs(share - weight / sum(weights)) < 4 / UNITS + 1e-12


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-5, 1.0), min_size=2, max_size=8), block=st.integers(0, 10**9))
def test_no_quota_is_ever_negative(weights: list[float], block: int) -> None:
    mixture = Mixture([Phase(0, tuple(weights))], seed=0)
    ends = [mixture.counts(block + i) for i in range(20)]
    assert all(a <= b for before, after in pairwise(ends) for a, b in zip(before, after, strict=True))


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 5000), count=st.integers(0, 3000))
def test_a_part_is_the_part_of_the_whole(first: int, count: int) -> None:
    mixture = Mixture([Phase(0, (0.61, 0.27, 0.1, 0.019, 0.001))], seed=3)
    whole = mixture.samples(0, 8000)
    for part, column in zip(mixture.samples(first, count), whole, strict=True):
        assert np.array_equal(part, column[first : first + count])


def test_weights_change_at_the_declared_sample_and_nothing_before_it_moves() -> None:
    plain = Mixture([Phase(0, (3, 1, 0))], seed=1)
    phased = Mixture([Phase(0, (3, 1, 0)), Phase(2048, (0, 1, 1))], seed=1)
    before, after = phased.samples(0, 2048), phased.samples(2048, 2048)
    for a, b in zip(before, plain.samples(0, 2048), strict=True):
        assert np.array_equal(a, b)
    assert set(before[0]) == {0, 1} and set(after[0]) == {1, 2}
    assert np.bincount(after[0]).tolist() == [0, 1024, 1024]
    assert after[1][after[0] == 1].tolist() == list(range(512, 512 + 1024))
    assert after[1][after[0] == 2].tolist() == list(range(1024))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (1.0, 1e-9), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_weights_that_cannot_be_dealt_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="data.phases"):
        Mixture([Phase(0, weights)], seed=0)


@pytest.mark.parametrize("start", [0, 1000, 1025])
def test_a_phase_that_starts_inside_a_block_is_refused_with_the_nearest_starts(start: int) -> None:
    with pytest.raises(ConfigError, match="multiples of 1024"):
        Mixture([Phase(0, (1.0, 1.0)), Phase(start, (1.0, 0.0))], seed=0)
