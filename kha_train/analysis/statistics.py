"""Statistics of curves: smoothing for the eye, and an interval that knows that neighbouring steps are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_BLOCK = 50
RESAMPLES = 2000
BOOTSTRAP_SEED = 0
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % point of Student's t with 1, 2, ... degrees of freedom; beyond ten the last one is used, which is wide."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, from `count` values resampled in blocks of `block`."""

    mean: float
    low: float
    high: float
    count: int
    block: int


@dataclass(frozen=True)
class SeedInterval:
    """The mean over `seeds` values, one a seed, with its 95 % Student interval."""

    mean: float
    low: float
    high: float
    seeds: int


def over_seeds(values: Sequence[float]) -> SeedInterval | None:
    """Mean of one value a seed, mean +- t sd / sqrt(n); None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = float(np.mean(values))
    half = STUDENT_975[min(count - 1, len(STUDENT_975)) - 1] * float(np.std(values, ddof=1)) / count**0.5
    return SeedInterval(mean, mean - half, mean + half, count)


def exponential_average(values: np.ndarray, decay: float) -> np.ndarray:
    """Bias-corrected exponential moving average, [N] -> [N]; a non-finite value repeats the average before it."""
    averages = np.full(len(values), np.nan)
    total = weight = 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1.0
        if weight:
            averages[index] = total / weight
    return averages


def display_decay(steps: int) -> float:
    """The decay whose half-life is 1 % of `steps`, at least one step. Curves that are to be compared by eye need one
    decay: on a falling curve an average lags behind, the more the longer its memory.
    """
    return float(0.5 ** (1.0 / max(1.0, 0.01 * steps)))


def block_bootstrap(values: np.ndarray) -> Interval | None:
    """Mean of `values` with a moving-block bootstrap interval (percentiles 2.5 and 97.5 of 2,000 resamples).

    Blocks of neighbouring steps keep their correlation; they are min(50, a tenth of the values) long. The seed is
    fixed, so that the same runs give the same interval. None for fewer than 10 values.
    """
    count = len(values)
    if count < 10:
        return None
    block = max(1, min(MAX_BLOCK, count // 10))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    block_means = (sums[block:] - sums[:-block]) / block
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    starts = generator.integers(0, len(block_means), size=(RESAMPLES, -(-count // block)))
    low, high = np.percentile(block_means[starts].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), count, block)
