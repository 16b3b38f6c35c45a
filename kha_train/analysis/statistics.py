"""Statistics of curves: smoothing for plots, and an interval that accounts for correlated steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kha_train.stability.statistics import rate, reported_rate

MIN_BLOCKS = 20
"""The minimum number of blocks of consecutive steps for an interval. Curves shorter than their correlation often look
like a few independent blocks. On simulated curves of 50 to 50,000 steps, with a correlation between steps of 0 to
0.999, at most 12 % of 95 % intervals missed the true value; with 10 blocks instead of 20 it was up to 25 %.
"""
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % point of Student's t with 1, 2, ... 10 degrees of freedom."""
NORMAL_975 = 1.959964


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
    """The mean of `count` values of consecutive steps. Blocks of `block` values are nearly independent; `interval` is
    None with fewer than `MIN_BLOCKS` of them.
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


def over_seeds(values: Sequence[float]) -> SeedInterval | None:
    """Mean of one value per seed, mean +- t sd / sqrt(n); None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = float(np.mean(values))
    half = student_975(count - 1) * float(np.std(values, ddof=1)) / count**0.5
    return SeedInterval(mean, mean - half, mean + half, count)


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

    The interval is the wider of two: Poisson's, which assumes one common rate, and value x exp(+- t sd / value), where
    sd is the standard error of the pooled rate estimated from the spread of the counts. In simulations with 2 to 10
    runs of 4 or 20 events whose true rates vary by 70 or 100 %, it covered the true value in 92 to 97 % of cases,
    Poisson's in 33 to 82.
    """
    total, exposure, runs = sum(counts), sum(exposures), len(counts)
    if runs < 2 or not total or exposure <= 0:
        return reported_rate(total, exposure)
    squares = sum((count - total * part / exposure) ** 2 for count, part in zip(counts, exposures, strict=True))
    factor = math.exp(student_975(runs - 1) * math.sqrt(runs / (runs - 1) * squares) / total)
    one = rate(total, exposure)
    value = one["value"]
    return {"value": value, "low": min(one["low"], value / factor), "high": max(one["high"], value * factor)}


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


def mean_of_steps(values: np.ndarray) -> StepMean | None:
    """Mean of `values` [N] (finite, in the order of steps) and its interval by batch means: mean +- t sd / sqrt(m) over
    the means of m blocks of `block_length` values. None without values.
    """
    count = len(values)
    if not count:
        return None
    block = block_length(values)
    blocks, mean = count // block, float(values.mean())
    if blocks < MIN_BLOCKS:
        return StepMean(mean, count, block, None)
    means = values[count - blocks * block :].reshape(blocks, block).mean(axis=1)
    half = student_975(blocks - 1) * float(means.std(ddof=1)) / blocks**0.5
    return StepMean(mean, count, block, Interval(mean, mean - half, mean + half, count, block))


def block_length(values: np.ndarray) -> int:
    """The number of consecutive values per block, from their measured autocorrelation: the automatic choice of Politis
    and White (2004), corrected by Patton, Politis and White (2009).

    Correlations count up to twice the lag after which the next five are all within 2 sqrt(log10 N / N) of zero (the
    paper's max(5, sqrt(log10 N)) is five for any curve). The paper searches for that lag up to sqrt(N). Here the search
    goes up to N / 2, because otherwise a slowly drifting curve would get blocks that are far too short.
    """
    count = len(values)
    covariance = _autocovariance(values)
    if count < MIN_BLOCKS or covariance[0] <= 0:
        return 1
    correlation = covariance / covariance[0]
    quiet, last = 5, count // 2
    large = np.abs(correlation[1 : last + quiet + 1]) > 2 * (math.log10(count) / count) ** 0.5
    calm = np.nonzero(np.convolve(large, np.ones(quiet), mode="valid") == 0)[0]
    lags = np.arange(1, min(2 * max(1, int(calm[0]) if len(calm) else last), count - 1) + 1)
    weighted = np.minimum(1.0, 2.0 * (1.0 - lags / lags[-1])) * covariance[lags]
    spectrum = covariance[0] + 2 * weighted.sum()
    if spectrum <= 0:
        return 1
    best: float = (1.5 * (2 * (lags * weighted).sum() / spectrum) ** 2 * count) ** (1 / 3)
    return max(1, min(count, math.ceil(best)))


def _autocovariance(values: np.ndarray) -> np.ndarray:
    """Autocovariance at lags 0 .. N - 1; each is a sum over the available pairs, divided by N."""
    count = len(values)
    transformed = np.fft.rfft(values - values.mean(), 2 * count)
    return np.fft.irfft(transformed * np.conj(transformed), 2 * count)[:count] / count
