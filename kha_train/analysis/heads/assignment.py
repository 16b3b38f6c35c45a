"""The assignment problem: the rows and columns of a table in pairs with the largest sum. The only user of scipy."""

# H rows and columns

from __future__ import annotations

import numpy as np

from kha_train.errors import ConfigError


def assigned(values_HH: np.ndarray) -> np.ndarray:
    """The column of each row, int64 [H], so that the sum of the chosen finite numbers is the largest possible.

    Raises ConfigError when scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError(
            "needs scipy", field="--match", value="not installed", fix="pip install 'kha_train[lab]'"
        ) from None
    _, column_H = linear_sum_assignment(values_HH, maximize=True)
    found_H: np.ndarray = column_H.astype(np.int64)
    return found_H
