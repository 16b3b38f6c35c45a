"""Statistics of curves and seeds: smoothing for plots, and intervals that cover what they claim.

`kha bench intervals` measures the coverage of every interval here on simulated curves (docs/statistics.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kha_train.stability.statistics import dispersed_interval, rate, reported_rate

MIN_BLOCKS, MAX_BLOCKS = 10, 50
"""The minimum number of blocks of consecutive steps for an interval, and the maximum: more narrow it by under 3 %."""
MIN_BLOCK, CORRELATION_TIMES = 30, 12
"""The minimum length of a block, in steps and in correlation times. The means of neighbouring blocks of an AR(1) curve
then correlate by at most 0.05.
"""
LEVEL_BLOCKS = 20
"""The minimum number of values from which an autocorrelation is estimated."""
FEW_EVENTS = 4
"""With fewer events a run on average, the counts say little about how much the rates of the runs differ."""
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % point of Student's t with 1, 2, ... 10 degrees of freedom."""
NORMAL_975 = 1.959964
SIGN_SEEDS = 6
"""The minimum number of seeds with which a sign test can reach p 0.05: 2 / 2^6 = 0.03."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, from `count` values in blocks of `block` neighbours."""

    mean: float
    low: float
    high: float
    count: int
    block: int


@dataclass(frozen=True)
class StepMean:
    """The mean of `count` values of consecutive steps. The means of blocks of `block` values are nearly independent;
    `interval` is None with fewer than `MIN_BLOCKS` of them.
    """

    mean: float
    count: int
    block: int
    interval: Interval | None

    @property
    def no_interval(self) -> str:
        """Why there is no interval, in words; empty where there is one."""
        blocks = self.count // self.block
        return "" if self.interval else f"no interval: {blocks} block{'s' * (blocks != 1)}, {MIN_BLOCKS} needed"


@dataclass(frozen=True)
class SeedInterval:
    """The mean over `seeds` values, one per seed, with its 95 % Student interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class SignTest:
    """How many of `seeds` values are `below` and `above` zero, and the two-sided exact probability `p` of a split at
    least as uneven if either sign were equally likely. `least` is the smallest p that so many seeds can reach.
    """

    seeds: int
    below: int
    above: int
    p: float
    least: float

    @property
    def words(self) -> str:
        """The result in words, and whether it could have said anything."""
        split = f"sign test: {self.below} below zero, {self.above} above, p {self.p:.2g}"
        return split if self.least <= 0.05 else f"{split} (cannot reach 0.05 with fewer than {SIGN_SEEDS} seeds)"


def over_seeds(values: Sequence[float]) -> SeedInterval | None:
    """Mean of one value per seed, mean +- t sd / sqrt(n); None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = float(np.mean(values))
    half = student_975(count - 1) * float(np.std(values, ddof=1)) / count**0.5
    return SeedInterval(mean, mean - half, mean + half, count)


def sign_test(values: Sequence[float]) -> SignTest:
    """The exact sign test of one value per seed, which assumes nothing about their distribution; zeros do not count."""
    below, above = sum(value < 0 for value in values), sum(value > 0 for value in values)
    count = below + above
    tail = sum(math.comb(count, fewer) for fewer in range(min(below, above) + 1)) / 2**count
    return SignTest(count, below, above, min(1.0, 2 * tail), min(1.0, 2 / 2**count))


def student_975(freedom: int) -> float:
    """The 97.5 % point of Student's t: tabulated up to 10 degrees of freedom, then the expansion 26.7.5 of Abramowitz
    and Stegun, within 0.001."""
    if freedom <= len(STUDENT_975):
        return STUDENT_975[freedom - 1]
    z, terms = NORMAL_975, ((1, 1, 4), (3, 16, 5, 96), (-15, 17, 19, 3, 384))
    powers = [sum(c * z ** (2 * i + 1) for i, c in enumerate(factors)) / below for *factors, below in terms]
    terms_left: float = sum(term / freedom**order for order, term in enumerate(powers, start=1))
    return z + terms_left


def pooled_rate(counts: Sequence[int], exposures: Sequence[float]) -> dict[str, float | None]:
    """Pooled events per unit of exposure of several runs whose true rates may differ, as `reported_rate`.

    The interval is for the mean rate over all such runs, not only these. It is the widest of three: Poisson's, for one
    common rate; with fewer than `FEW_EVENTS` events a run, that of rates which vary by 100 % (`dispersed_interval`);
    and one from the spread of the counts, value x exp(-h) to value x exp(h + h^2 / 6). Here h = t sd / value, and sd is
    the standard error of the pooled rate. The square is the next term of the Edgeworth expansion of Student's t for
    gamma-distributed rates, whose skewness is twice their variation.
    """
    total, exposure, runs = sum(counts), sum(exposures), len(counts)
    if runs < 2 or exposure <= 0:
        return reported_rate(total, exposure)
    one = rate(total, exposure)
    value, low, high = one["value"], one["low"], one["high"]
    if total < FEW_EVENTS * runs:
        few_low, few_high = dispersed_interval(total, exposure**2 / math.fsum(part**2 for part in exposures))
        low, high = min(low, few_low / exposure), max(high, few_high / exposure)
    if total:
        squares = sum((count - total * part / exposure) ** 2 for count, part in zip(counts, exposures, strict=True))
        half = student_975(runs - 1) * math.sqrt(runs / (runs - 1) * squares) / total
        low, high = min(low, value * math.exp(-half)), max(high, value * math.exp(half + half**2 / 6))
    return {"value": value, "low": low, "high": high}


def exponential_average(values: np.ndarray, decay: float) -> np.ndarray:
    """Bias-corrected exponential moving average, [N] -> [N]; a non-finite value repeats the average before it."""
    averages = np.full(len(values), np.nan)
    total = weight = 0.0
    for index, value in enumerate(values.tolist()):
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1.0
        if weight:
            averages[index] = total / weight
    return averages


def display_decay(steps: int) -> float:
    """The decay whose half-life is 1 % of `steps`, at least one step. Curves compared by eye need the same decay: on a
    falling curve an average lags behind, and more so with a longer memory.
    """
    return float(0.5 ** (1.0 / max(1.0, 0.01 * steps)))


def mean_of_steps(values: np.ndarray, before: np.ndarray) -> StepMean | None:
    """Mean of `values` [N] (finite, in the order of steps) and its interval by batch means: mean +- t sd / sqrt(m) over
    the means of m blocks. None without values.

    The length of a block follows the autocorrelation of `before`, the values of the steps before, and there is no
    interval when they are fewer than a third of N. If `values` chose their own length, intervals would be given where
    they look calm by chance, and would miss more often. Only where they need blocks of more than twice that length are
    theirs used.
    """
    count = len(values)
    if not count:
        return None
    mean, block = float(values.mean()), _block(values, before)
    blocks = count // block
    if blocks < MIN_BLOCKS:
        return StepMean(mean, count, block, None)
    block = count // blocks
    means = values[count - blocks * block :].reshape(blocks, block).mean(axis=1)
    half = student_975(blocks - 1) * float(means.std(ddof=1)) / blocks**0.5
    return StepMean(mean, count, block, Interval(mean, mean - half, mean + half, count, block))


def _block(values: np.ndarray, before: np.ndarray) -> int:
    count = len(values)
    if 3 * len(before) < count:
        return count
    chosen, own = (max(MIN_BLOCK, math.ceil(CORRELATION_TIMES * correlation_time(each))) for each in (before, values))
    return min(count, max(own if own > 2 * chosen else chosen, count // MAX_BLOCKS))


def correlation_time(values: np.ndarray) -> float:
    """The number of steps after which `values` [N] are nearly independent: 1 for independent ones, 1 / (1 - r) for an
    AR(1) curve with correlation r between neighbours, up to half as much again where this is many steps.

    The largest of 1 + a r / (1 - r) over the means of blocks of a = 1, 2, 4, ... values, where r is the correlation of
    neighbouring means, corrected for its bias -(1 + 3 r) / m in m of them (Kendall 1954). Beyond a = 1 only an r
    above two standard errors counts. Long blocks reveal a slow drift that noise from step to step conceals.
    """
    longest, block = 1.0, 1
    # Equal values minus their mean leave rounding errors, which correlate.
    rounding = (1e-12 * float(np.abs(values).max(initial=0.0))) ** 2
    while (blocks := len(values) // block) >= LEVEL_BLOCKS:
        means = values[len(values) - blocks * block :].reshape(blocks, block).mean(axis=1)
        apart = means - means.mean()
        squares = float(apart @ apart)
        found = float(apart[1:] @ apart[:-1]) / squares if squares > rounding * blocks else 0.0
        if block == 1 or found > 2 / blocks**0.5:
            correlation = min(max((blocks * found + 1) / (blocks - 3), 0.0), 1 - 1e-4)
            longest = max(longest, 1 + block * correlation / (1 - correlation))
        block *= 2
    return longest
