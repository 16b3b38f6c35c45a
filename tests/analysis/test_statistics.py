"""Intervals over steps, seeds and runs have their claimed coverage, or there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kha_train.analysis.statistics import (
    MIN_BLOCKS,
    block_length,
    exponential_average,
    mean_of_steps,
    over_seeds,
    pooled_rate,
    student_975,
)
from kha_train.stability.statistics import poisson_interval

# F steps of a curve  C curves


def autoregressive(curves: int, steps: int, correlation: float, seed: int) -> np.ndarray:
    """Curves [C, F] of mean 0 and variance 1 with this correlation between neighbours."""
    generator = np.random.default_rng(seed)
    noise_CF = generator.normal(size=(curves, steps)) * math.sqrt(1 - correlation**2)
    values_CF, last_C = np.empty((curves, steps)), generator.normal(size=curves)
    for step in range(steps):
        last_C = correlation * last_C + noise_CF[:, step]
        values_CF[:, step] = last_C
    return values_CF


def naive_half(values: np.ndarray) -> float:
    """Half the 95 % interval of independent values."""
    return 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("correlation", [0.0, 0.8, 0.98])
def test_an_interval_seldom_misses_the_truth_or_there_is_none(steps: int, correlation: float) -> None:
    curves = autoregressive(400, steps, correlation, seed=5)
    found = [mean_of_steps(values).interval for values in curves]
    given = sum(one is not None for one in found)
    missed = sum(one is not None and not one.low <= 0 <= one.high for one in found)
    naive = sum(abs(values.mean()) > naive_half(values) for values in curves)
    # 10 % and four standard errors of 400 trials. An interval of independent steps misses half at 0.8, 84 % at 0.98.
    assert missed <= 64
    # The blocks required by the correlation are enough here, and hardly ever elsewhere.
    enough = correlation == 0 or (steps, correlation) == (1000, 0.8)
    assert given > 380 if enough else given < 30
    assert naive > 150 or correlation == 0


def test_independent_steps_have_an_interval_of_the_usual_width() -> None:
    curves = autoregressive(200, 400, 0.0, seed=1)
    found = [mean_of_steps(values) for values in curves]
    given_ones = [(one.interval, values) for one, values in zip(found, curves, strict=True) if one.interval]
    assert len(given_ones) > 190
    widths = [(one.high - one.low) / 2 / naive_half(values) for one, values in given_ones]
    assert 0.95 < np.mean(widths) < 1.15


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_the_length_of_a_block_is_the_best_one_for_a_known_autocorrelation(correlation: float) -> None:
    """Politis and White: (2 G^2 / D)^(1/3) N^(1/3), and of an AR(1) G / g(0) = 2 r / (1 - r^2), D = 4/3 g(0)^2."""
    steps = 20_000
    best = (1.5 * (2 * correlation / (1 - correlation**2)) ** 2 * steps) ** (1 / 3)
    lengths = [block_length(values) for values in autoregressive(20, steps, correlation, seed=2)]
    assert np.median(lengths) == pytest.approx(best, rel=0.1)


def test_a_drifting_difference_has_no_interval() -> None:
    drift = np.linspace(0, 1, 2000) + np.random.default_rng(0).normal(scale=0.01, size=2000)
    found = mean_of_steps(drift)
    assert found.interval is None and found.mean == pytest.approx(0.5, abs=0.01)
    assert f"{MIN_BLOCKS} needed" in found.no_interval


def test_too_few_values_have_a_mean_and_no_interval() -> None:
    assert mean_of_steps(np.array([])) is None
    one = mean_of_steps(np.array([2.5]))
    assert (one.mean, one.interval, one.no_interval) == (2.5, None, "no interval: 1 block, 20 needed")
    ten = mean_of_steps(np.arange(10.0) % 2)
    assert (ten.mean, ten.interval, ten.no_interval) == (0.5, None, "no interval: 10 blocks, 20 needed")
    equal = mean_of_steps(np.full(MIN_BLOCKS, -0.25))
    assert (equal.interval.low, equal.interval.high, equal.no_interval) == (-0.25, -0.25, "")


def test_the_interval_is_that_of_batch_means_by_hand() -> None:
    values = np.random.default_rng(3).normal(size=203)
    found = mean_of_steps(values)
    blocks = len(values) // found.block
    means = [part.mean() for part in np.split(values[len(values) - blocks * found.block :], blocks)]
    half = student_975(blocks - 1) * np.std(means, ddof=1) / math.sqrt(blocks)
    assert (found.interval.low, found.interval.high) == pytest.approx((values.mean() - half, values.mean() + half))


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.706), (10, 2.228), (11, 2.201), (19, 2.093), (120, 1.980)])
def test_students_point_is_that_of_the_tables(freedom: int, point: float) -> None:
    assert student_975(freedom) == pytest.approx(point, abs=1.1e-3)


def test_one_seed_has_no_interval() -> None:
    assert over_seeds([0.1]) is None
    pair = over_seeds([0.1, 0.3])
    assert (pair.low, pair.high) == pytest.approx((0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1))


def test_the_pooled_rate_of_runs_that_differ_covers_the_true_rate_where_poissons_does_not() -> None:
    generator = np.random.default_rng(0)
    covered = poisson = 0
    for _ in range(300):
        counts = generator.poisson(20 * generator.gamma(2.0, 0.5, size=5))
        found = pooled_rate([int(count) for count in counts], [1.0] * 5)
        low, high = poisson_interval(int(counts.sum()))
        covered += found["low"] <= 20 <= found["high"]
        poisson += low <= 100 <= high
    # Of 2,000 trials 94 % and 47 % did; the bounds are more than four standard errors of 300 away.
    assert covered > 262
    assert poisson < 180


def test_a_pooled_rate_is_poissons_where_the_runs_agree_and_none_without_exposure() -> None:
    low, high = poisson_interval(20)
    assert pooled_rate([4] * 5, [2.0] * 5) == pytest.approx({"value": 2.0, "low": low / 10, "high": high / 10})
    assert pooled_rate([7], [2.0])["high"] == pytest.approx(poisson_interval(7)[1] / 2)
    assert pooled_rate([0, 0], [1.0, 1.0])["low"] == 0.0
    assert pooled_rate([], []) == pooled_rate([0], [0.0]) == {"value": None, "low": None, "high": None}


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_the_exponential_average_is_its_recursion(values: list[float], decay: float) -> None:
    total = weight = 0.0
    expected = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        expected.append(total / weight)
    np.testing.assert_allclose(exponential_average(np.array(values), decay), expected, atol=1e-12)


def test_the_exponential_average_repeats_itself_over_a_gap() -> None:
    average = exponential_average(np.array([math.nan, 1.0, math.nan, math.inf, 3.0]), 0.5)
    np.testing.assert_allclose(average, [math.nan, 1.0, 1.0, 1.0, (0.5 + 3.0) / 1.5])
