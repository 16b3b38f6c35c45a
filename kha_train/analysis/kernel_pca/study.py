"""One streaming method of kernel PCA on digits, as a trial of a study."""

# N vectors   D pixels of one   R components

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from kha_train.analysis.computation import Computation
from kha_train.analysis.kernel_pca.algorithms import (
    CentredKernel,
    Gain,
    GainKind,
    KernelHebbian,
    exact,
    gaussian,
    reconstruction_error,
)
from kha_train.analysis.kernel_pca.digits import MOST, load_digits
from kha_train.analysis.kernel_pca.trial import median_distance
from kha_train.errors import ConfigError, between

PRODUCTS = {"constant": 1, "t": 1, "et": 2, "et_normalised": 2, "smd": 4}
"""How often a step multiplies an R x R matrix by an R x N one."""
TIMED_STEPS = 30


@dataclass(frozen=True)
class _Problem:
    """Digits of one draw: their kernel, the least reconstruction error, and the excess without any component."""

    kernel: CentredKernel
    kernel_NN: np.ndarray
    least: float
    excess_of_none: float


@lru_cache(maxsize=1)
def _digits(vectors: int, components: int, seed: int) -> _Problem:
    pixels_ND = load_digits(vectors, seed).pixels_ND
    kernel = CentredKernel(pixels_ND, gaussian(median_distance(pixels_ND)))
    kernel_NN = kernel.matrix()
    total = float(np.trace(kernel_NN))
    least = total - float(exact(kernel_NN, components).eigenvalues_R.sum())
    return _Problem(kernel, kernel_NN, least, total / least - 1)


@dataclass(frozen=True, kw_only=True)
class KernelPca(Computation):
    """The Kernel Hebbian Algorithm on `vectors` digits, drawn by the seed, which also sets its start and the order of
    the digits. Its gain is `method` with `rate` as eta0; a step takes one digit. The kernel is a Gaussian as wide as
    the median distance.

    `log10_excess` is the logarithm of (error - least error) / least error at the end, the error being the squared
    distance of all digits from their reconstructions; `log10_excess_half` is the same after half of the passes.
    """

    figures: ClassVar[tuple[str, ...]] = ("log10_excess", "log10_excess_half")
    method: GainKind
    vectors: int = 400
    components: int = 10

    @property
    def _passes(self) -> int:
        return self.steps // self.vectors

    def invalid(self) -> ConfigError | None:
        """See `Computation.invalid`."""
        if not 20 <= self.vectors <= MOST:
            return ConfigError("not as many digits", field="vectors", value=self.vectors, allowed=between(20, MOST))
        if not 1 <= self.components <= self.vectors // 2:
            allowed = between(1, self.vectors // 2)
            return ConfigError("not as many components", field="components", value=self.components, allowed=allowed)
        if self._passes < 2 or self.steps % (2 * self.vectors):
            allowed = f"multiples of {2 * self.vectors}, which are two passes over the digits"
            return ConfigError("no even number of passes", field="steps", value=self.steps, allowed=allowed)
        return None

    def measure(self) -> Mapping[str, float]:
        """See `Computation.measure`."""
        problem, excess = _digits(self.vectors, self.components, self.seed), []
        gain = Gain(kind=self.method, eta0=self.rate)
        # A rate that is too high diverges, which its error says.
        with np.errstate(all="ignore"):
            for state in KernelHebbian(problem.kernel, self.components, gain).passes(self._passes, self.seed):
                excess.append(reconstruction_error(state.a_RN, problem.kernel_NN) / problem.least - 1)
                # No components at all are not worse.
                if not excess[-1] <= problem.excess_of_none:
                    return dict.fromkeys(self.figures, np.inf)
        # Rounding may put the error of a converged method below the least one.
        ends = (max(excess[number - 1], 1e-16) for number in (len(excess), len(excess) // 2))
        return dict(zip(self.figures, map(math.log10, ends), strict=True))

    def flops(self) -> float:
        """See `Computation.flops`."""
        a_step = 2 * self.components * self.vectors * (2 + PRODUCTS[self.method] * self.components)
        return float(self.steps * a_step)

    def memory(self) -> int:
        """The kernel matrix, once as columns and once for the error."""
        return 2 * 8 * self.vectors**2

    def seconds_a_step(self) -> float:
        """See `Computation.seconds_a_step`."""
        kernel = CentredKernel(np.random.default_rng(0).normal(size=(self.vectors, 2)), gaussian(1.0))
        streamed = KernelHebbian(kernel, self.components, Gain(kind=self.method, eta0=1e-3))
        state = streamed.start(np.random.default_rng(0))
        eigenvalues_R = streamed.eigenvalues(state)
        began = time.perf_counter()
        for number in range(TIMED_STEPS):
            streamed.step(state, number % self.vectors, eigenvalues_R)
        return (time.perf_counter() - began) / TIMED_STEPS
