"""Kernel PCA against linear algebra, and the streaming forms against their equations and the exact components."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kha_train.analysis.kernel_pca.algorithms import (
    CentredKernel,
    Gain,
    GainKind,
    KernelHebbian,
    State,
    exact,
    gaussian,
    preimages,
    reconstruction_error,
)

N, R, PASSES = 120, 4, 40
BEST: dict[GainKind, float] = {"constant": 0.0625, "t": 0.5, "et": 4.0, "et_normalised": 0.25, "smd": 0.125}
"""The best at pass 20 of a grid of powers of two."""
SIZES, CENTRES = (44, 32, 22, 14, 8), ((-1.2, 0), (1.2, 0), (0, 1.4), (0, -1.6), (2.2, 1.8))
"""Five clouds of different sizes: leading eigenvalues 21.3, 14.0, 9.3, 8.2, and then 5.7."""


def points() -> np.ndarray:
    """Clouds in the plane."""
    random = np.random.default_rng(0)
    return np.concatenate([random.normal(c, 0.35, (n, 2)) for n, c in zip(SIZES, CENTRES, strict=True)])


@pytest.fixture(scope="module")
def kernel() -> CentredKernel:
    return CentredKernel(points(), gaussian(0.5))


def test_centring_is_that_of_the_definition_for_columns_and_for_other_vectors(kernel: CentredKernel) -> None:
    x = points()
    plain = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * 0.5**2))
    means = np.full((N, N), 1 / N)
    expected = plain - means @ plain - plain @ means + means @ plain @ means
    np.testing.assert_allclose(kernel.matrix(), expected, atol=1e-13)
    np.testing.assert_allclose(kernel.column(7), expected[7], atol=1e-13)
    other = np.array([[0.3, -0.2]])
    row = np.exp(-((other - x) ** 2).sum(-1) / (2 * 0.5**2))
    np.testing.assert_allclose(kernel.of(other)[0], row - row.mean() - plain.mean(0) + plain.mean(), atol=1e-13)


def test_a_kernel_that_is_computed_in_blocks_is_the_same(
    kernel: CentredKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kha_train.analysis.kernel_pca.algorithms._BLOCK_NUMBERS", 7 * N)
    streamed = CentredKernel(points(), gaussian(0.5))
    np.testing.assert_allclose(streamed.matrix(), kernel.matrix(), atol=1e-13)
    first, second = (KernelHebbian(one, R, Gain(kind="smd", eta0=0.1)) for one in (streamed, kernel))
    ends = [next(algorithm.passes(1)).a_RN for algorithm in (first, second)]
    np.testing.assert_allclose(*ends, atol=1e-10)


def test_with_the_linear_kernel_the_exact_components_are_those_of_pca() -> None:
    x = np.random.default_rng(1).normal(size=(50, 6)) * np.array([5, 4, 3, 2, 1, 0.5])
    centred = CentredKernel(x, lambda a, b: a @ b.T)
    found = exact(centred.matrix(), 3)
    middle = x - x.mean(0)
    _, values, axes = np.linalg.svd(middle, full_matrices=False)
    np.testing.assert_allclose(found.eigenvalues_R, values[:3] ** 2, rtol=1e-10)
    np.testing.assert_allclose(np.abs(found.a_RN @ middle @ axes[:3].T), np.eye(3), atol=1e-10)
    left = middle - middle @ axes[:3].T @ axes[:3]
    assert reconstruction_error(found.a_RN, centred.matrix()) == pytest.approx((left**2).sum(), rel=1e-10)
    # Components that are not orthonormal reconstruct by W^T W as they are.
    skew = np.random.default_rng(2).normal(size=(3, 50)) / 50
    weights = skew @ middle
    left = middle - middle @ weights.T @ weights
    assert reconstruction_error(skew, centred.matrix()) == pytest.approx((left**2).sum(), rel=1e-10)


def optimum(kernel: CentredKernel) -> float:
    matrix = kernel.matrix()
    return float(np.trace(matrix) - np.linalg.eigvalsh(matrix)[-R:].sum())


@cache
def excess(kind: GainKind) -> tuple[list[float], np.ndarray]:
    """The excess relative reconstruction error after each pass, and the last coefficients."""
    kernel = CentredKernel(points(), gaussian(0.5))
    matrix, least = kernel.matrix(), optimum(kernel)
    found = []
    for state in KernelHebbian(kernel, R, Gain(kind=kind, eta0=BEST[kind])).passes(PASSES):
        found.append(reconstruction_error(state.a_RN, matrix) / least - 1)
    assert np.isfinite(state.a_RN).all() and np.isfinite(state.b_RN).all() and np.isfinite(state.rho_R).all()
    return found, state.a_RN


def test_gains_by_eigenvalue_come_within_a_thousandth_of_the_optimum_in_40_passes(kernel: CentredKernel) -> None:
    components = exact(kernel.matrix(), R)
    for kind in ("et", "et_normalised", "smd"):
        errors, a_RN = excess(kind)
        assert -1e-12 < errors[-1] < 1e-3
        cosines = np.einsum("rn,nm,rm->r", a_RN, kernel.matrix(), components.a_RN)
        norms = np.sqrt(np.einsum("rn,nm,rm->r", a_RN, kernel.matrix(), a_RN))
        assert (np.abs(cosines / norms) > 0.99).all()


def test_at_pass_20_gains_by_eigenvalue_are_ahead_of_1_over_t_which_is_ahead_of_a_constant() -> None:
    by_eigenvalue, by_time, constant = (excess(kind)[0][19] for kind in ("et", "t", "constant"))
    assert by_eigenvalue < by_time < constant


def test_meta_descent_of_rate_0_is_the_normalised_gain_bit_for_bit(kernel: CentredKernel) -> None:
    plain, meta = (
        list(KernelHebbian(kernel, R, Gain(kind=kind, eta0=0.25, mu=0.0)).passes(3, seed=5))[-1]
        for kind in ("et_normalised", "smd")
    )
    assert np.array_equal(plain.a_RN, meta.a_RN) and np.array_equal(plain.ak_RN, meta.ak_RN)
    assert meta.b_RN.any() and not plain.b_RN.any() and not meta.rho_R.any()
    moved = list(KernelHebbian(kernel, R, Gain(kind="smd", eta0=0.25, mu=0.1)).passes(1, seed=5))[-1]
    assert moved.rho_R.all()


def run(kernel: CentredKernel, rho: np.ndarray, steps: int, mu: float = 0.0, xi: float = 1.0) -> State:
    """The state after some steps of meta-descent from a fixed start, with rho held at `rho` (where mu is 0)."""
    algorithm = KernelHebbian(kernel, R, Gain(kind="smd", eta0=0.1, mu=mu, xi=xi))
    state = algorithm.start(np.random.default_rng(3))
    state.rho_R = rho.copy()
    eigenvalues_R = algorithm.eigenvalues(state)
    for number in np.random.default_rng(4).permutation(N)[:steps]:
        algorithm.step(state, int(number), eigenvalues_R)
    return state


def test_b_is_the_derivative_of_the_coefficients_by_finite_differences(kernel: CentredKernel) -> None:
    step = 1e-5
    up, down = (run(kernel, np.full(R, sign * step), 60).a_RN for sign in (1, -1))
    np.testing.assert_allclose(run(kernel, np.zeros(R), 60).b_RN, (up - down) / (2 * step), atol=1e-8)
    assert np.abs(up - down).max() / (2 * step) > 1e-3
    # Row 0 depends on its own gain alone.
    alone = np.eye(R)[0] * step
    up, down = (run(kernel, sign * alone, 60).a_RN for sign in (1, -1))
    np.testing.assert_allclose(run(kernel, np.zeros(R), 60).b_RN[0], (up - down)[0] / (2 * step), atol=1e-8)


def test_the_gains_move_by_the_meta_gradient_by_finite_differences(kernel: CentredKernel) -> None:
    """rho rises by mu <G K', dA / drho>, where G is that of equation 16 and dA / drho is differenced."""
    steps, step, mu = 40, 1e-5, 0.01
    number = int(np.random.default_rng(4).permutation(N)[steps])
    state = run(kernel, np.zeros(R), steps)
    up, down = (run(kernel, np.full(R, sign * step), steps).a_RN for sign in (1, -1))
    matrix = kernel.matrix()
    y = state.a_RN @ matrix[number]
    g = -np.tril(np.outer(y, y)) @ state.a_RN
    g[:, number] += y
    expected = mu * np.einsum("rn,nm,rm->r", g, matrix, (up - down) / (2 * step))
    algorithm = KernelHebbian(kernel, R, Gain(kind="smd", eta0=0.1, mu=mu, xi=1.0))
    first = algorithm.eigenvalues(algorithm.start(np.random.default_rng(3)))
    algorithm.step(state, number, first)
    np.testing.assert_allclose(state.rho_R, expected, atol=1e-8)
    assert np.abs(expected).max() > 1e-5


def test_the_product_with_the_kernel_is_kept_up_to_date(kernel: CentredKernel) -> None:
    state = run(kernel, np.zeros(R), 120, mu=0.1, xi=0.99)
    np.testing.assert_allclose(state.ak_RN, state.a_RN @ kernel.matrix(), atol=1e-10)


@pytest.mark.parametrize("kind", ["constant", "t", "et", "et_normalised"])
def test_steps_follow_the_printed_gains(kernel: CentredKernel, kind: GainKind) -> None:
    gain = Gain(kind=kind, eta0=0.3, tau=50.0)
    algorithm = KernelHebbian(kernel, R, gain)
    state = algorithm.start(np.random.default_rng(0))
    state.steps = 25
    before, matrix = state.a_RN.copy(), kernel.matrix()
    eigenvalues = np.linalg.norm(before @ matrix, axis=1) / np.linalg.norm(before, axis=1)
    np.testing.assert_allclose(algorithm.eigenvalues(state), eigenvalues, rtol=1e-12)
    fading = 0.3 * 50 / 75
    gains = {
        "constant": np.full(R, 0.3), "t": np.full(R, fading), "et": fading / eigenvalues,
        "et_normalised": fading * np.sqrt((eigenvalues**2).sum()) / eigenvalues,
    }[kind]  # fmt: skip
    algorithm.step(state, 11, eigenvalues)
    y = before @ matrix[11]
    expected = before.copy()
    for i in range(R):
        expected[i] -= gains[i] * sum(y[i] * y[j] * before[j] for j in range(i + 1))
        expected[i, 11] += gains[i] * y[i]
    np.testing.assert_allclose(state.a_RN, expected, atol=1e-12)


def test_preimages_of_a_noisy_circle_come_back_to_the_circle() -> None:
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, 200)
    circle = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    kernel = CentredKernel(circle, gaussian(0.5))
    noisy = circle[:50] + random.normal(0, 0.15, (50, 2))
    found = preimages(kernel, exact(kernel.matrix(), 8).a_RN, noisy, 0.5)
    off = [np.abs(np.linalg.norm(points, axis=1) - 1).mean() for points in (noisy, found)]
    assert off[1] < off[0] / 3
