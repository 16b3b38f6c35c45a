"""How many seeds a paired comparison needs to find an effect: the power of Student's t test, by numeric integration.

The differences of pairs, one a seed, are taken as independent and normal. With n of them, t = mean / (sd / sqrt n) has
a noncentral t distribution with n - 1 degrees of freedom and the noncentrality sqrt(n) effect / sd (Cohen, Statistical
Power Analysis for the Behavioral Sciences, 1988, chapter 2).
"""

# X points of the grid

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kha_train.analysis.certify.certified import SeedsNeeded
from kha_train.analysis.statistics import student_975

LEVEL, POWER = 0.05, 0.8
"""Of a two-sided test: the share of false findings where there is no effect, and of true ones where there is one."""
MOST_SEEDS = 1000
"""More seeds than this are not searched for."""
POINTS = 1001
"""Points of the integral over chi-squared; odd, for Simpson's rule."""


def seeds_for(variant: str, effect: float, stated: bool, differences: Sequence[float]) -> SeedsNeeded:
    """How many seeds find `effect`, from the spread of `differences`, one a seed; `stated` says that the effect was
    chosen and not measured.
    """
    count = len(differences)
    if count < 2 or not effect:
        return SeedsNeeded(variant, effect, stated, count, None, None, (None, None), (None, None))
    spread = float(np.std(differences, ddof=1))
    low, high = (spread * factor for factor in spread_limits(count - 1))
    needed = tuple(seeds_needed(effect, one) for one in (low, high))
    return SeedsNeeded(
        variant, effect, stated, count, spread, seeds_needed(effect, spread), (low, high), (needed[0], needed[1])
    )


def seeds_needed(effect: float, spread: float) -> int | None:
    """The fewest seeds with which a two-sided t test at `LEVEL` finds `effect` with probability `POWER`, where the
    differences have the standard deviation `spread`; None above `MOST_SEEDS`.
    """
    if power(MOST_SEEDS, effect, spread) < POWER:
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect, spread) >= POWER else (middle, high)
    return high


def power(count: int, effect: float, spread: float) -> float:
    """The probability that the test finds `effect` with `count` seeds; 1 without any spread."""
    if count < 2 or not spread:
        return float(count >= 2)
    limit, shift = student_975(count - 1), math.sqrt(count) * abs(effect) / spread
    return 1 - t_cdf(limit, count - 1, shift) + t_cdf(-limit, count - 1, shift)


def spread_limits(freedom: int) -> tuple[float, float]:
    """The factors of a measured standard deviation between which the true one lies with 95 % confidence, for normal
    values: sqrt(freedom / chi-squared)."""
    root_X, weight_X = _chi(freedom)
    below_X = np.cumsum(weight_X) - weight_X / 2
    low, high = (float(np.interp(share, below_X, root_X)) for share in (1 - LEVEL / 2, LEVEL / 2))
    return 1 / low, 1 / high


def t_cdf(value: float, freedom: int, shift: float = 0.0) -> float:
    """The probability that noncentral t is at most `value`: the mean of the normal distribution function at
    value x - shift, over x, the root of chi-squared / freedom."""
    root_X, weight_X = _chi(freedom)
    places = ((value * root_X - shift) / math.sqrt(2)).tolist()
    return float(weight_X @ np.array([math.erfc(-place) / 2 for place in places]))


def _chi(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """The root of chi-squared / freedom at equal distances [X], and the probability near each [X], by Simpson's
    rule. Its density is proportional to x^(freedom - 1) exp(-freedom x^2 / 2)."""
    wide = 9 / math.sqrt(2 * freedom)
    root_X = np.linspace(max(0.0, 1 - wide), 1 + wide, POINTS)
    with np.errstate(divide="ignore"):
        log_X = (freedom - 1) * np.log(root_X) if freedom > 1 else np.zeros(POINTS)
    density_X = np.exp(log_X - freedom * (root_X**2 - 1) / 2)
    density_X[1:-1] *= np.where(np.arange(1, POINTS - 1) % 2, 4, 2)
    return root_X, density_X / density_X.sum()
