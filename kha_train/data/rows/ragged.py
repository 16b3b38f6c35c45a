"""Many runs of consecutive integers, in a fixed number of NumPy calls."""

# N runs

from __future__ import annotations

import numpy as np


def runs(starts_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """The integers start, start + 1, ... (`count` of them) of every run, concatenated: int64."""
    before_N = np.cumsum(counts_N) - counts_N
    numbers: np.ndarray = np.arange(int(counts_N.sum())) + np.repeat(starts_N - before_N, counts_N)
    return numbers


def spanned(first_N: np.ndarray, last_N: np.ndarray) -> np.ndarray:
    """The integers in any of the ranges [first, last], each once, ascending: int64."""
    return np.unique(runs(first_N, last_N - first_N + 1))


def sums_before(counts_N: np.ndarray) -> np.ndarray:
    """int64 [N + 1]: the sum of the counts before each one, and of all."""
    return np.concatenate(([0], np.cumsum(counts_N, dtype=np.int64)))
