"""Exact and streaming kernel PCA on digits and on a synthetic walk: what `kha kernel-pca` measures.

The gain of each streaming method is the power of two with the least reconstruction error after the last pass, in the
worse of two seeds that are used for nothing else, among those whose double does not diverge: a gain at the border
diverges in other seeds. Where one diverges all the same, its figures are NaN.
"""

# N vectors   D their width   M held-out vectors   R components   F frames

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from kha_train.analysis.kernel_pca.algorithms import (
    CentredKernel,
    Gain,
    GainKind,
    Kernel,
    KernelHebbian,
    exact,
    gaussian,
    preimages,
    reconstruction_error,
    squared_distances,
)
from kha_train.analysis.kernel_pca.digits import groups, load_digits

METHODS: tuple[GainKind, ...] = get_args(GainKind)
ETA_POWERS = range(-7, 5)
TUNING_SEEDS, DIGITS = (100, 101), 10
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Streamed:
    """One method on one problem: its tuned `eta0` (`at_edge`: the grid ends there), and by seed the excess relative
    reconstruction error and the seconds after each pass. `a_RN` has the coefficients of the first seed. Seconds count
    the steps alone.
    """

    eta0: float
    at_edge: bool
    errors: tuple[tuple[float, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    a_RN: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Problem:
    """A kernel with its exact components and those of every streaming method."""

    kernel: CentredKernel
    exact_RN: np.ndarray
    exact_seconds: float
    eigenvalues: tuple[float, ...]
    streamed: Mapping[GainKind, Streamed]

    def coefficients(self) -> dict[str, np.ndarray]:
        """Coefficients by the name of the method, `exact` first."""
        return {"exact": self.exact_RN, **{name: one.a_RN for name, one in self.streamed.items()}}


@dataclass(frozen=True)
class Denoised:
    """Clean and noisy vectors, and by method what it makes of the noisy ones."""

    clean_MD: np.ndarray
    noisy_MD: np.ndarray
    found: Mapping[str, np.ndarray]

    def errors(self) -> dict[str, float]:
        """The mean squared distance of a coordinate from its clean value, by method."""
        every = {"noisy": self.noisy_MD, **self.found}
        return {name: float(((one_MD - self.clean_MD) ** 2).mean()) for name, one_MD in every.items()}


@dataclass(frozen=True)
class Trial:
    """Everything that was measured; `purity` is by method, of clusters of the digits."""

    digits: Problem
    affinity: Problem
    purity: Mapping[str, float]
    images: Denoised
    walk: Denoised


def run_trial(count: int, components: int, passes: int, seeds: int, advance: Advance) -> Trial:
    """The whole trial on `count` digits, and half as many held out; `advance` is called for finished passes, of which
    there are `passes_of(passes, seeds, seeds, 1)`. Raises ConfigError as `load_digits`.
    """
    held_out = count // 2
    pixels_ND, labels_N = load_digits(count + held_out, 0)
    seen_ND, unseen_MD, labels_N = pixels_ND[:count], pixels_ND[count:], labels_N[:count]
    random = np.random.default_rng(1)
    width = median_distance(seen_ND)
    digits = solve(seen_ND, gaussian(width), components, passes, seeds, advance)
    affinity = solve(seen_ND, normalised(gaussian(width), seen_ND), DIGITS, passes, seeds, advance)
    purities = {name: _purity_of(affinity.kernel, a_RN, labels_N) for name, a_RN in affinity.coefficients().items()}
    noisy_MD = unseen_MD + random.normal(0, 0.3, unseen_MD.shape)
    images = denoise(digits, width, seen_ND, unseen_MD, noisy_MD)
    walk_FD = walk(240)
    noisy_FD = walk_FD + random.normal(0, 0.05, walk_FD.shape)
    width = median_distance(noisy_FD)
    moving = solve(noisy_FD, gaussian(width), 6, passes, 1, advance)
    return Trial(digits, affinity, purities, images, denoise(moving, width, noisy_FD, walk_FD, noisy_FD))


def passes_of(passes: int, *seeds: int) -> int:
    """How many passes problems of so many seeds need."""
    return sum(passes * len(METHODS) * (len(TUNING_SEEDS) * len(ETA_POWERS) + one) for one in seeds)


def solve(
    x_ND: np.ndarray, kernel: Kernel, components: int, passes: int, seeds: int, advance: Advance = lambda passes: None
) -> Problem:
    """The components of `x_ND` by every method."""
    centred = CentredKernel(x_ND, kernel)
    started = time.perf_counter()
    kernel_NN = centred.matrix()
    a_RN, eigenvalues_R = exact(kernel_NN, components)
    seconds = time.perf_counter() - started
    least = float(np.trace(kernel_NN) - eigenvalues_R.sum())

    def streamed(kind: GainKind, eta0: float, seed: int) -> tuple[list[float], list[float], np.ndarray]:
        errors, times, spent = [], [], 0.0
        states = KernelHebbian(centred, components, Gain(kind=kind, eta0=eta0)).passes(passes, seed)
        # A gain that is too large diverges: its error is not finite, so it is not chosen.
        with np.errstate(all="ignore"):
            for _ in range(passes):
                began = time.perf_counter()
                state = next(states)
                spent += time.perf_counter() - began
                errors.append(reconstruction_error(state.a_RN, kernel_NN) / least - 1)
                times.append(spent)
        advance(passes)
        return errors, times, state.a_RN

    def tuned(kind: GainKind) -> Streamed:
        last = [[streamed(kind, 2.0**power, seed)[0][-1] for seed in TUNING_SEEDS] for power in ETA_POWERS]
        # No components at all have this excess; a method that ends above it has diverged.
        none = float(np.trace(kernel_NN)) / least - 1
        worst = np.where(np.isfinite(last) & (np.array(last) <= none), last, np.inf).max(axis=1)
        best = int(np.argmin(np.where(np.isfinite(worst[1:]), worst[:-1], np.inf)))
        runs = [streamed(kind, 2.0 ** ETA_POWERS[best], seed) for seed in range(seeds)]
        errors, times = tuple(tuple(run[0]) for run in runs), tuple(tuple(run[1]) for run in runs)
        return Streamed(2.0 ** ETA_POWERS[best], best in (0, len(ETA_POWERS) - 2), errors, times, runs[0][2])

    return Problem(centred, a_RN, seconds, tuple(eigenvalues_R.tolist()), {kind: tuned(kind) for kind in METHODS})


def median_distance(x_ND: np.ndarray) -> float:
    """The median distance of different vectors, of the first 500."""
    x_ND = x_ND[:500]
    distances_NN = np.sqrt(squared_distances(x_ND, x_ND))
    return float(np.median(distances_NN[np.triu_indices(len(x_ND), 1)]))


def normalised(kernel: Kernel, x_ND: np.ndarray) -> Kernel:
    """k(x, y) / sqrt(d(x) d(y)), d(x) being the mean of k(x, x_j): the affinity of spectral clustering (Ng, Jordan and
    Weiss, NIPS 2001) times the number of vectors.
    """

    def affinity(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
        degrees = (np.sqrt(kernel(one_ND, x_ND).mean(1)) for one_ND in (a_ND, b_ND))
        affinity_NN: np.ndarray = kernel(a_ND, b_ND) / np.outer(*degrees)
        return affinity_NN

    return affinity


def purity(groups_N: np.ndarray, labels_N: np.ndarray) -> float:
    """The share of vectors whose label is the most common one of their group."""
    most = [np.bincount(labels_N[groups_N == group]).max() for group in np.unique(groups_N)]
    return float(sum(most) / len(labels_N))


def _purity_of(kernel: CentredKernel, a_RN: np.ndarray, labels_N: np.ndarray) -> float:
    """Of k-means on components of unit length over the vectors, and then vectors of unit length; NaN for coefficients
    that diverged.
    """
    if not np.isfinite(a_RN).all():
        return float("nan")
    points_NR = kernel.of(kernel.x_ND) @ a_RN.T
    points_NR /= np.linalg.norm(points_NR, axis=0)
    points_NR /= np.linalg.norm(points_NR, axis=1)[:, None]
    return purity(groups(points_NR, DIGITS, 0), labels_N)


def denoise(
    problem: Problem, width: float, seen_ND: np.ndarray, clean_MD: np.ndarray, noisy_MD: np.ndarray
) -> Denoised:
    """What linear PCA, with as many components, and every method make of noisy vectors."""
    components, mean_D = len(problem.exact_RN), seen_ND.mean(0)
    axes_RD = np.linalg.svd(seen_ND - mean_D, full_matrices=False)[2][:components]
    found = {"linear PCA": mean_D + (noisy_MD - mean_D) @ axes_RD.T @ axes_RD}
    for name, a_RN in problem.coefficients().items():
        # From coefficients that diverged the fixed point would stay at the noisy vectors.
        is_finite = bool(np.isfinite(a_RN).all())
        found[name] = preimages(problem.kernel, a_RN, noisy_MD, width) if is_finite else np.full_like(noisy_MD, np.nan)
    return Denoised(clean_MD, noisy_MD, found)


def walk(frames: int) -> np.ndarray:
    """Markers of two walking legs, hip, knee and ankle of each, in the plane: [F, 12], a step every 60 frames.

    Angles of thigh and knee are sums of two harmonics, the legs half a step apart; a thigh is 0.45 long, a shin 0.42.
    """
    markers = []
    for side in (0.0, np.pi):
        phase_F = 2 * np.pi * np.arange(frames) / 60 + side
        thigh_F = 0.45 * np.cos(phase_F)
        shin_F = thigh_F - 0.55 * (1 + np.cos(phase_F + 1.9)) * (0.6 + 0.4 * np.cos(2 * phase_F))
        hip_F = np.stack((0.02 * np.sin(2 * phase_F), 0.9 + 0.03 * np.cos(2 * phase_F)))
        knee_F = hip_F + 0.45 * np.stack((np.sin(thigh_F), -np.cos(thigh_F)))
        markers += [hip_F, knee_F, knee_F + 0.42 * np.stack((np.sin(shin_F), -np.cos(shin_F)))]
    walk_FD: np.ndarray = np.concatenate(markers).T
    return walk_FD
