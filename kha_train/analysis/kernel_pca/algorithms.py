"""Kernel PCA, exactly and by the Kernel Hebbian Algorithm. The trainer never uses it: docs/kernel_pca.md.

The Kernel Hebbian Algorithm shares the letters KHA with Knocking-Heads Attention, and nothing else. Günter, Schraudolph
and Vishwanathan, Fast Iterative Kernel Principal Component Analysis, JMLR 8 (2007) 1893-1918; its numbers of equations
stand beside the code. With coefficients A, component i of a vector x is sum_j A_ij k'(x_j, x), where k' is the kernel
after centring in feature space. Exact components have unit norm there: A K' A^T = I.
"""

# N vectors   D their width   M other vectors   R components   C columns of the kernel computed at once

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""[M, D] and [N, D] -> [M, N], symmetric and positive semidefinite."""
GainKind = Literal["constant", "t", "et", "et_normalised", "smd"]
_BLOCK_NUMBERS = 1 << 22
"""Numbers of the kernel computed at once, and kept."""


def squared_distances(x_MD: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    """|x - y|^2 of every two vectors, [M, N]."""
    squares_MN = (x_MD**2).sum(1)[:, None] + (y_ND**2).sum(1) - 2 * (x_MD @ y_ND.T)
    distances_MN: np.ndarray = np.maximum(squares_MN, 0)
    return distances_MN


def gaussian(width: float) -> Kernel:
    """exp(-|x - y|^2 / (2 width^2))."""

    def kernel(x_MD: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
        kernel_MN: np.ndarray = np.exp(squared_distances(x_MD, y_ND) / (-2 * width**2))
        return kernel_MN

    return kernel


class CentredKernel:
    """The kernel of the vectors `x_ND` after centring in feature space, K' = K - MK - KM + MKM, column by column.

    Of many vectors only the means of the columns are kept, O(N), so a kernel matrix that does not fit into memory is no
    obstacle. Up to 2,048 vectors K' is kept, at most 34 MB.
    """

    def __init__(self, x_ND: np.ndarray, kernel: Kernel) -> None:
        self.x_ND, self.kernel = x_ND, kernel
        self.means_N = np.concatenate([block_CN.mean(1) for block_CN in self._blocks(kernel)])
        self.mean = float(self.means_N.mean())
        self._kept_NN = self.matrix() if len(x_ND) ** 2 <= _BLOCK_NUMBERS else None

    def __len__(self) -> int:
        return len(self.x_ND)

    def column(self, number: int) -> np.ndarray:
        """Column `number` of K', [N]."""
        if self._kept_NN is not None:
            kept_N: np.ndarray = self._kept_NN[number]
            return kept_N
        column_N: np.ndarray = self.of(self.x_ND[number : number + 1])[0]
        return column_N

    def of(self, y_MD: np.ndarray) -> np.ndarray:
        """k'(y, x) of other vectors, [M, N], centred at the mean of the N vectors."""
        kernel_MN = self.kernel(y_MD, self.x_ND)
        centred_MN: np.ndarray = kernel_MN - kernel_MN.mean(1)[:, None] - self.means_N + self.mean
        return centred_MN

    def blocks(self) -> Iterator[np.ndarray]:
        """All columns of K', [C, N] at a time."""
        return self._blocks(lambda part_CD, _: self.of(part_CD))

    def matrix(self) -> np.ndarray:
        """K', [N, N]."""
        return np.concatenate(list(self.blocks()))

    def _blocks(self, kernel: Kernel) -> Iterator[np.ndarray]:
        rows = max(1, _BLOCK_NUMBERS // len(self.x_ND))
        for first in range(0, len(self.x_ND), rows):
            yield kernel(self.x_ND[first : first + rows], self.x_ND)


class Components(NamedTuple):
    """Coefficients A of the leading components, and their eigenvalues, largest first (None where only estimated)."""

    a_RN: np.ndarray
    eigenvalues_R: np.ndarray


def exact(kernel_NN: np.ndarray, components: int) -> Components:
    """The leading `components` of a centred kernel matrix by `eigh`, each of unit norm in feature space."""
    eigenvalues_N, vectors_NN = np.linalg.eigh(kernel_NN)
    largest = np.argsort(eigenvalues_N)[::-1][:components]
    values_R = eigenvalues_N[largest]
    return Components((vectors_NN[:, largest] / np.sqrt(values_R)).T, values_R)


def reconstruction_error(a_RN: np.ndarray, kernel_NN: np.ndarray) -> float:
    """The squared distance in feature space of the vectors from their reconstructions W^T W x, summed over the vectors.

    The components W need not be orthonormal. The least possible value is trace(K') less the leading eigenvalues.
    """
    projected_RN = a_RN @ kernel_NN
    gram_RR = projected_RN @ a_RN.T
    squares_RR = projected_RN @ projected_RN.T
    return float(np.trace(kernel_NN) - 2 * np.trace(squares_RR) + (gram_RR * squares_RR).sum())


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How large the steps are. With t the steps taken before, over all passes, `eta0` scales

    constant        1
    t               tau / (t + tau)
    et              tau / (t + tau) / lambda_i                       lambda_i = |(A K')_i| / |A_i|     (20)
    et_normalised   tau / (t + tau) |lambda| / lambda_i              (22), where tau is N
    smd             the same times exp(rho_i): stochastic meta-descent, of rate `mu` and memory `xi`   (31, 32, 37)

    lambda is refreshed before every pass. `tau` 0 stands for N. With `mu` 0, smd is et_normalised bit for bit.
    """

    kind: GainKind
    eta0: float
    tau: float = 0.0
    mu: float = 1.0
    xi: float = 0.99


@dataclass
class State:
    """What the algorithm keeps, O(R N): coefficients A; A K', which the gains by eigenvalue keep up to date with A
    (`constant` and `t` leave it as it began); and of meta-descent, the logarithms rho of the gains and B, how A depends
    on them.
    """

    a_RN: np.ndarray
    ak_RN: np.ndarray
    rho_R: np.ndarray
    b_RN: np.ndarray
    steps: int = 0


class KernelHebbian:
    """The Kernel Hebbian Algorithm (Kim, Franz and Schölkopf) on a centred kernel, with a gain (14, 16).

    `start` gives the first state, `step` takes one vector, `passes` takes all, in another order each time.
    """

    def __init__(self, kernel: CentredKernel, components: int, gain: Gain) -> None:
        self.kernel, self.components, self.gain = kernel, components, gain
        self._needs_ak = gain.kind in ("et", "et_normalised", "smd")

    def start(self, random: np.random.Generator) -> State:
        """A_1 of independent normal numbers of variance 1 / (R N)."""
        shape = (self.components, len(self.kernel))
        a_RN = random.standard_normal(shape) / np.sqrt(self.components * len(self.kernel))
        return State(a_RN, self._times_kernel(a_RN), np.zeros(self.components), np.zeros(shape))

    def passes(self, count: int, seed: int = 0) -> Iterator[State]:
        """The state after each of `count` passes; the next pass changes it in place."""
        random = np.random.default_rng(seed)
        state = self.start(random)
        for _ in range(count):
            eigenvalues_R = self.eigenvalues(state)
            for number in random.permutation(len(self.kernel)):
                self.step(state, int(number), eigenvalues_R)
            yield state

    def eigenvalues(self, state: State) -> np.ndarray:
        """Estimates of the leading eigenvalues (20); after a step of `constant` or `t` they are out of date."""
        estimates_R: np.ndarray = np.linalg.norm(state.ak_RN, axis=1) / np.linalg.norm(state.a_RN, axis=1)
        return estimates_R

    def step(self, state: State, number: int, eigenvalues_R: np.ndarray) -> None:
        """Take vector `number`: A grows by the gains times G = y e^T - lt(y y^T) A (16)."""
        k_N = self.kernel.column(number)
        y_R = state.a_RN @ k_N
        lower_RR = np.tril(np.outer(y_R, y_R))
        gains_R = self._gains(state.steps, eigenvalues_R)
        pushed_RN = np.outer(y_R, k_N) - lower_RR @ state.ak_RN if self._needs_ak else None
        if self.gain.kind == "smd":
            assert pushed_RN is not None
            state.rho_R += self.gain.mu * (pushed_RN * state.b_RN).sum(1)
            gains_R = np.exp(state.rho_R) * gains_R
            self._learn_b(state, number, k_N, y_R, lower_RR, gains_R)
        shrunk_RN = lower_RR @ state.a_RN
        state.a_RN -= gains_R[:, None] * shrunk_RN
        state.a_RN[:, number] += gains_R * y_R
        if pushed_RN is not None:
            # G K', so that A K' needs no kernel matrix (33, 34).
            state.ak_RN += gains_R[:, None] * pushed_RN
        state.steps += 1

    def _gains(self, steps: int, eigenvalues_R: np.ndarray) -> np.ndarray:
        gain, size = self.gain, float(len(self.kernel))
        if gain.kind == "constant":
            return np.full(self.components, gain.eta0)
        tau = gain.tau or size
        scale = gain.eta0 * tau / (steps + tau)
        if gain.kind == "t":
            return np.full(self.components, scale)
        norm = 1.0 if gain.kind == "et" else float(np.linalg.norm(eigenvalues_R))
        gains_R: np.ndarray = scale * norm / eigenvalues_R
        return gains_R

    def _learn_b(
        self, state: State, number: int, k_N: np.ndarray, y_R: np.ndarray, lower_RR: np.ndarray, gains_R: np.ndarray
    ) -> None:
        """(37): how A depends on rho, with a memory that fades by xi a step."""
        xi = self.gain.xi
        mixed_RN = state.a_RN + xi * state.b_RN
        turned_RR = np.outer(state.b_RN @ k_N, y_R)
        change_RN = lower_RR @ mixed_RN + xi * (np.tril(turned_RR + turned_RR.T) @ state.a_RN)
        state.b_RN = xi * state.b_RN - gains_R[:, None] * change_RN
        state.b_RN[:, number] += gains_R * (mixed_RN @ k_N)

    def _times_kernel(self, a_RN: np.ndarray) -> np.ndarray:
        return np.concatenate([a_RN @ block_CN.T for block_CN in self.kernel.blocks()], axis=1)


def preimages(kernel: CentredKernel, a_RN: np.ndarray, y_MD: np.ndarray, width: float, rounds: int = 100) -> np.ndarray:
    """Vectors [M, D] whose images come close to the projections of those of `y_MD` onto the components (de-noising).

    For a Gaussian kernel of `width`, by the fixed point of Mika et al. (NIPS 1998), which starts at `y_MD`.
    """
    weights_MN = kernel.of(y_MD) @ a_RN.T @ a_RN
    # The projection is the mean image plus the components: sum_j (weight_j - mean weight + 1 / N) image of x_j.
    weights_MN += (1 - weights_MN.sum(1))[:, None] / len(kernel)
    found_MD = y_MD.copy()
    for _ in range(rounds):
        pulls_MN = weights_MN * gaussian(width)(found_MD, kernel.x_ND)
        total_M = pulls_MN.sum(1)
        # A vector far from all others has no pull; it stays where it is.
        steady_M = np.abs(total_M) > 1e-9
        next_MD = (pulls_MN @ kernel.x_ND) / np.where(steady_M, total_M, 1.0)[:, None]
        next_MD = np.where(steady_M[:, None], next_MD, found_MD)
        if np.abs(next_MD - found_MD).max() < 1e-9:
            break
        found_MD = next_MD
    return found_MD
