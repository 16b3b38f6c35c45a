"""The handwritten digits of scikit-learn, and its k-means; the only user of that package."""

# N digits   D pixels of one (8 x 8)   R coordinates

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from kha_train.errors import ConfigError, between

SIDE, MOST = 8, 1797
"""Pixels on each side of a digit, and how many digits there are."""


class Digits(NamedTuple):
    """Images as rows of pixels from 0 to 1, and which digit each is."""

    pixels_ND: np.ndarray
    labels_N: np.ndarray


def load_digits(count: int, seed: int) -> Digits:
    """`count` digits, drawn without replacement. Raises ConfigError when there are not as many, or no scikit-learn."""
    found = _sklearn().datasets.load_digits()
    if not 1 <= count <= MOST:
        raise ConfigError("not as many digits", field="count", value=count, allowed=between(1, MOST))
    chosen_N = np.random.default_rng(seed).permutation(MOST)[:count]
    return Digits(found.data[chosen_N] / 16, found.target[chosen_N])


def groups(points_NR: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The group of each point by k-means, best of ten starts. Raises ConfigError when there is no scikit-learn."""
    means = _sklearn().cluster.KMeans(count, n_init=10, random_state=seed)
    found_N: np.ndarray = means.fit_predict(points_NR)
    return found_N


def _sklearn() -> ModuleType:
    """Raises ConfigError when scikit-learn is missing."""
    try:
        import sklearn.cluster
        import sklearn.datasets
    except ImportError:
        raise ConfigError(
            "needs scikit-learn", field="kernel-pca", value="not installed", fix="pip install 'kha_train[lab]'"
        ) from None
    package: ModuleType = sklearn
    return package
