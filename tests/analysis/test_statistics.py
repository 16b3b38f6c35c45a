"""Intervals over steps, seeds and runs have their claimed coverage, or there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kha_train.analysis.statistics import (
    MIN_BLOCKS,
    correlation_time,
    exponential_average,
    mean_of_steps,
    over_seeds,
    pooled_rate,
    sign_test,
    student_975,
)
from kha_train.stability.statistics import dispersed_interval, poisson_interval

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


def before_and_after(curves: int, steps: int, correlation: float, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(the quarter before, the last half) of curves of this many steps."""
    for values in autoregressive(curves, steps - steps // 4, correlation, seed):
        yield values[: steps // 4], values[steps // 4 :]


def naive_half(values: np.ndarray) -> float:
    """Half the 95 % interval of independent values."""
    return 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("steps", "correlation", "given"), [(2000, 0.0, 380), (2000, 0.8, 200), (2000, 0.98, 0), (200, 0.0, 0)]
)
def test_an_interval_seldom_misses_the_truth_or_there_is_none(steps: int, correlation: float, given: int) -> None:
    curves = list(before_and_after(400, steps, correlation, seed=5))
    found = [mean_of_steps(values, before).interval for before, values in curves]
    printed = [one for one in found if one is not None]
    missed = sum(not one.low <= 0 <= one.high for one in printed)
    naive = sum(abs(values.mean()) > naive_half(values) for _, values in curves)
    # At 8 % more misses have a probability below 0.001. An interval of independent steps misses half at 0.8.
    assert missed <= 52 if printed else not given
    assert given <= len(printed) <= (400 if given else 4)
    assert naive > 150 or correlation == 0


def test_a_curve_that_looks_calm_by_chance_gets_no_interval_for_that() -> None:
    """The length of a block follows the steps before, so curves with an interval are not the calm ones."""
    curves = list(before_and_after(600, 1500, 0.8, seed=9))
    printed = [(values, mean_of_steps(values, before).interval) for before, values in curves]
    given = [values for values, interval in printed if interval is not None]
    assert 60 < len(given) < 540
    spread = np.mean([values.mean() ** 2 for values, _ in printed])
    assert np.mean([values.mean() ** 2 for values in given]) == pytest.approx(spread, rel=0.25)


def test_independent_steps_have_an_interval_of_the_usual_width() -> None:
    curves = list(before_and_after(200, 2000, 0.0, seed=1))
    found = [mean_of_steps(values, before) for before, values in curves]
    given_ones = [(one.interval, values) for one, (_, values) in zip(found, curves, strict=True) if one.interval]
    assert len(given_ones) > 180
    widths = [(one.high - one.low) / 2 / naive_half(values) for one, values in given_ones]
    assert 0.95 < np.mean(widths) < 1.15


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_correlation_time_of_a_known_autocorrelation_is_found(correlation: float) -> None:
    """Of an AR(1) curve it is 1 / (1 - r). Blocks of 1 << n << time give 1.5 times that: the correlation of means of n
    neighbours is 1 - 2 n (1 - r) / 3."""
    times = [correlation_time(values) for values in autoregressive(20, 20_000, correlation, seed=2)]
    assert 0.97 <= np.median(times) * (1 - correlation) <= 1.65


def test_a_drift_under_noise_of_equal_size_has_the_correlation_time_of_the_drift() -> None:
    drifts, noise = autoregressive(20, 20_000, 0.99, seed=3), np.random.default_rng(4).normal(size=(20, 20_000))
    assert 60 < np.median([correlation_time(values) for values in drifts + noise]) < 200


def test_a_drifting_difference_has_no_interval() -> None:
    drift = np.linspace(0, 1, 3000) + np.random.default_rng(0).normal(scale=0.01, size=3000)
    found = mean_of_steps(drift[1000:], drift[:1000])
    assert found.interval is None and found.mean == pytest.approx(0.667, abs=0.01)
    assert f"{MIN_BLOCKS} needed" in found.no_interval
    calm = np.random.default_rng(1).normal(size=1000)
    assert mean_of_steps(drift[1000:], calm).interval is None, "what drifts only later has none either"


def test_too_few_values_have_a_mean_and_no_interval() -> None:
    assert mean_of_steps(np.array([]), np.array([])) is None
    one = mean_of_steps(np.array([2.5]), np.array([1.0]))
    assert (one.mean, one.interval, one.no_interval) == (2.5, None, "no interval: 1 block, 10 needed")
    some = mean_of_steps(np.arange(200.0) % 2, np.arange(100.0) % 2)
    assert (some.mean, some.interval, some.no_interval) == (0.5, None, "no interval: 6 blocks, 10 needed")
    equal = mean_of_steps(np.full(300, -0.25), np.full(100, -0.25))
    assert (equal.interval.low, equal.interval.high, equal.no_interval) == (-0.25, -0.25, "")
    blind = mean_of_steps(np.full(300, -0.25), np.full(99, -0.25))
    assert blind.no_interval == "no interval: 1 block, 10 needed"


def test_the_interval_is_that_of_batch_means_by_hand() -> None:
    values, before = np.random.default_rng(3).normal(size=643), np.random.default_rng(4).normal(size=321)
    found = mean_of_steps(values, before)
    blocks = 643 // 30
    means = [part.mean() for part in np.split(values[643 - blocks * found.block :], blocks)]
    half = student_975(blocks - 1) * np.std(means, ddof=1) / math.sqrt(blocks)
    assert found.block == 643 // blocks
    assert (found.interval.low, found.interval.high) == pytest.approx((values.mean() - half, values.mean() + half))


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.706), (10, 2.228), (11, 2.201), (19, 2.093), (120, 1.980)])
def test_students_point_is_that_of_the_tables(freedom: int, point: float) -> None:
    assert student_975(freedom) == pytest.approx(point, abs=1.1e-3)


def test_one_seed_has_no_interval() -> None:
    assert over_seeds([0.1]) is None
    pair = over_seeds([0.1, 0.3])
    assert (pair.low, pair.high) == pytest.approx((0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1))


def test_the_sign_test_is_the_binomial_one_and_says_when_it_can_say_nothing() -> None:
    three = sign_test([-0.1, -0.2, -0.3])
    assert (three.p, three.least) == (0.25, 0.25) and "cannot reach 0.05 with fewer than 6 seeds" in three.words
    six = sign_test([0.1] * 6)
    assert (six.p, six.least) == (0.03125, 0.03125) and six.words.endswith("p 0.031")
    # Two of ten below: 2 (1 + 10 + 45) / 1024.
    assert sign_test([-1.0] * 2 + [1.0] * 8 + [0.0]).p == pytest.approx(0.109375)
    assert [sign_test([-1.0] * below + [math.inf] * above).p for below, above in ((5, 0), (4, 1))] == [0.0625, 0.375]
    assert sign_test([1.0, -1.0]).p == sign_test([]).p == 1.0


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
    # Without an event in three runs of exponential rates of mean m: (1 / (1 + m))^3 = 0.025.
    assert pooled_rate([0] * 3, [1.0] * 3)["high"] == pytest.approx(0.025 ** (-1 / 3) - 1)
    assert pooled_rate([7], [2.0])["high"] == pytest.approx(poisson_interval(7)[1] / 2)
    assert pooled_rate([0, 0], [1.0, 1.0])["low"] == 0.0
    assert pooled_rate([], []) == pooled_rate([0], [0.0]) == {"value": None, "low": None, "high": None}


def test_the_interval_of_dispersed_counts_leaves_a_fortieth_in_each_tail() -> None:
    """Against numpy's negative binomial at the limits of 6 events in 3 runs."""
    low, high = dispersed_interval(6, 3.0)
    source = np.random.default_rng(0)
    beyond = [
        np.mean(outside(source.negative_binomial(3, 3 / (3 + mean), 400_000)))
        for mean, outside in ((low, lambda seen: seen >= 6), (high, lambda seen: seen <= 6))
    ]
    assert beyond == pytest.approx([0.025, 0.025], abs=0.0012)


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
