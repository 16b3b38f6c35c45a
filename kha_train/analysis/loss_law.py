"""The loss as a law of the training tokens, L(D) = (Dc / D)^a + L0 (MEA eq 35), fitted by least squares.

For a given exponent `a` the law is linear in `Dc^a` and `L0`, so only the exponent is searched: over a grid, then by
golden sections around its best point. A law describes runs at a constant learning rate; the decay of a schedule is not
part of it.
"""

# N points of the curve

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kha_train.analysis.runs import RunData

EXPONENTS_N = np.geomspace(0.01, 4.0, 400)
"""The grid of exponents. At its ends the law is nearly a logarithm, or drops at once."""
GOLDEN = (5**0.5 - 1) / 2
REFINEMENTS = 80
"""Golden sections: each keeps 62 % of the interval, so this many reach the precision of a double."""
FEWEST_POINTS = 8
BINS = 24
"""Points into which the curve of a run is averaged, at equal ratios of tokens."""
LEFT_OUT = 0.1
"""The share of the tokens at the start that is not fitted: the warm-up of the rate."""


@dataclass(frozen=True)
class LossLaw:
    """A fitted law: `tokens` is Dc, `exponent` a, `floor` L0 in nats, and `error` the root mean square of what is
    left. `at_edge`: the exponent is at an end of the searched range, so the curve does not determine the law.
    """

    tokens: float
    exponent: float
    floor: float
    error: float
    at_edge: bool

    def at(self, tokens: float) -> float:
        """The loss that the law gives after so many tokens."""
        return float((self.tokens / tokens) ** self.exponent + self.floor)


def fit_loss_law(tokens_N: np.ndarray, loss_N: np.ndarray) -> LossLaw | None:
    """The law nearest to the losses after so many tokens; None with fewer than `FEWEST_POINTS` finite points, or where
    the loss does not fall.
    """
    finite_N = np.isfinite(loss_N) & (tokens_N > 0)
    if finite_N.sum() < FEWEST_POINTS:
        return None
    # Powers of counts of billions lose digits; those of ratios to the middle do not.
    unit = float(np.exp(np.log(tokens_N[finite_N]).mean()))
    ratio_N, seen_N = tokens_N[finite_N] / unit, loss_N[finite_N]
    errors_N = np.array([_solve(exponent, ratio_N, seen_N)[2] for exponent in EXPONENTS_N])
    best = int(errors_N.argmin())
    low, high = EXPONENTS_N[max(best - 1, 0)], EXPONENTS_N[min(best + 1, len(EXPONENTS_N) - 1)]
    exponent = _refine(float(low), float(high), ratio_N, seen_N)
    factor, floor, error = _solve(exponent, ratio_N, seen_N)
    if factor <= 0:
        return None
    at_edge = best in (0, len(EXPONENTS_N) - 1)
    return LossLaw(unit * factor ** (1 / exponent), exponent, floor, (error / len(seen_N)) ** 0.5, at_edge)


def law_of_run(run: RunData) -> LossLaw | None:
    """The law of a run's train loss, from means over `BINS` stretches of equal ratios of tokens, without the first
    tenth. None where `fit_loss_law` has none.
    """
    tokens_N, loss_N = run.column("tokens"), run.column("train/loss")
    known_N = np.isfinite(tokens_N) & np.isfinite(loss_N)
    if not known_N.any():
        return None
    tokens_N, loss_N = tokens_N[known_N], loss_N[known_N]
    edges_N = np.geomspace(LEFT_OUT * tokens_N[-1], tokens_N[-1], BINS + 1)
    places_N = np.digitize(tokens_N, edges_N[:-1]) - 1
    inside = [places_N == place for place in range(BINS) if (places_N == place).any()]
    # The mean of a power of the tokens is near that of their logarithms.
    means_N = np.array([np.exp(np.log(tokens_N[chosen]).mean()) for chosen in inside])
    return fit_loss_law(means_N, np.array([loss_N[chosen].mean() for chosen in inside]))


def _solve(exponent: float, ratio_N: np.ndarray, loss_N: np.ndarray) -> tuple[float, float, float]:
    """(factor, floor, sum of squares) of the best `factor * ratio^-exponent + floor`."""
    power_N = ratio_N**-exponent
    around_N = power_N - power_N.mean()
    spread = float(around_N @ around_N)
    factor = float(around_N @ loss_N) / spread if spread > 0 else 0.0
    floor = float(loss_N.mean() - factor * power_N.mean())
    left_N = loss_N - factor * power_N - floor
    return factor, floor, float(left_N @ left_N)


def _refine(low: float, high: float, ratio_N: np.ndarray, loss_N: np.ndarray) -> float:
    """The exponent between `low` and `high` with the smallest sum of squares, by golden sections."""
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    sums = [_solve(exponent, ratio_N, loss_N)[2] for exponent in inner]
    for _ in range(REFINEMENTS):
        if sums[0] <= sums[1]:
            high, inner[1], sums[1] = inner[1], inner[0], sums[0]
            inner[0] = high - GOLDEN * (high - low)
            sums[0] = _solve(inner[0], ratio_N, loss_N)[2]
        else:
            low, inner[0], sums[0] = inner[0], inner[1], sums[1]
            inner[1] = low + GOLDEN * (high - low)
            sums[1] = _solve(inner[1], ratio_N, loss_N)[2]
    return (low + high) / 2
