"""The seeds that an effect needs are those of textbooks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kha_train.analysis.certify.power import power, seeds_for, seeds_needed, spread_limits, t_cdf


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_number_of_seeds_is_that_of_cohens_small_medium_and_large_effects(effect: float, seeds: int) -> None:
    """The paired t test at 80 % and 5 %, as G*Power gives it (Faul et al., 2007)."""
    assert seeds_needed(effect, 1.0) == seeds
    assert seeds_needed(-0.01 * effect, 0.01) == seeds


def test_the_power_of_34_pairs_at_a_medium_effect_is_that_of_g_power() -> None:
    assert power(34, 0.5, 1.0) == pytest.approx(0.8078, abs=1e-4)
    assert power(10, 0.0, 1.0) == pytest.approx(0.05, abs=1e-4)
    assert power(5, 0.1, 0.0) == 1.0 and power(1, 9.0, 1.0) == 0.0


def test_noncentral_t_agrees_with_a_simulation_and_central_t_with_its_tables() -> None:
    for freedom, point in ((1, 12.706205), (2, 4.302653), (5, 2.570582), (10, 2.228139), (100, 1.983972)):
        assert t_cdf(point, freedom) == pytest.approx(0.975, abs=1e-7)
    drawn = np.random.default_rng(0)
    count, shift = 400_000, 1.5
    t = (drawn.normal(shift, 1, count)) / np.sqrt(drawn.chisquare(4, count) / 4)
    for value in (0.0, 1.0, 3.0):
        assert t_cdf(value, 4, shift) == pytest.approx(float((t <= value).mean()), abs=4 * math.sqrt(0.25 / count))


def test_the_limits_of_a_standard_deviation_are_those_of_chi_squared() -> None:
    """From the tabulated points of chi-squared: 0.000982 and 5.024 with 1, 2.700 and 19.023 with 9 degrees."""
    for freedom, low, high in ((1, 0.0009821, 5.0239), (9, 2.7004, 19.0228)):
        expected = math.sqrt(freedom / high), math.sqrt(freedom / low)
        assert spread_limits(freedom) == pytest.approx(expected, rel=1e-3)


def test_few_seeds_say_how_little_they_know() -> None:
    found = seeds_for("kha", 0.01, True, (0.02, 0.0))
    assert found.spread == pytest.approx(0.01 * math.sqrt(2))
    assert found.needed == seeds_needed(0.01, found.spread) == 18
    assert found.needed_limits[1] is None and found.needed_limits[0] < found.needed
    assert seeds_for("kha", 0.01, True, (0.02,)).needed is None
