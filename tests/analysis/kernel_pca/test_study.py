"""A trial of kernel PCA, against the same computed in an explicit feature space."""

from __future__ import annotations

import numpy as np
import pytest

from kha_train.analysis.kernel_pca.algorithms import CentredKernel, Gain, KernelHebbian, gaussian
from kha_train.analysis.kernel_pca.digits import load_digits
from kha_train.analysis.kernel_pca.study import KernelPca
from kha_train.analysis.kernel_pca.trial import median_distance

pytest.importorskip("sklearn")


def trial(method: str = "et", rate: float = 1.0, seed: int = 3, steps: int = 160) -> KernelPca:
    return KernelPca(method=method, rate=rate, seed=seed, steps=steps, vectors=40, components=3)  # type: ignore[arg-type]


def test_the_excess_is_that_of_reconstructions_in_feature_space() -> None:
    """K' = F F^T gives every digit as a row of F; components are W = A F, reconstructions F W^T W."""
    pixels = load_digits(40, 3).pixels_ND
    kernel = CentredKernel(pixels, gaussian(median_distance(pixels)))
    values, vectors = np.linalg.eigh(kernel.matrix())
    features = vectors * np.sqrt(np.maximum(values, 0))
    least = values[:-3].sum()
    excess = []
    for state in KernelHebbian(kernel, 3, Gain(kind="et", eta0=1.0)).passes(4, 3):
        axes = state.a_RN @ features
        excess.append(((features - features @ axes.T @ axes) ** 2).sum() / least - 1)
    found = trial().measure()
    expected = {"log10_excess": np.log10(excess[3]), "log10_excess_half": np.log10(excess[1])}
    assert found == pytest.approx(expected, abs=1e-9)
    assert found["log10_excess"] < found["log10_excess_half"]


def test_methods_of_a_seed_share_digits_start_and_order_and_a_rate_that_is_too_high_diverges() -> None:
    still = {method: trial(method, 1e-300).measure()["log10_excess"] for method in ("constant", "t", "et", "smd")}
    assert len(set(still.values())) == 1
    assert trial(rate=1e-300, seed=4).measure()["log10_excess"] not in still.values()
    assert trial(rate=1e3).measure() == {"log10_excess": np.inf, "log10_excess_half": np.inf}


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"steps": 200}, "steps"), ({"vectors": 1798}, "vectors"), ({"components": 21}, "components")],
)
def test_settings_that_cannot_be_computed_are_named(changed: dict[str, int], word: str) -> None:
    settings = {"steps": 160, "vectors": 40, "components": 3} | changed
    problem = KernelPca(method="t", rate=1.0, seed=0, **settings).invalid()  # type: ignore[arg-type]
    assert problem is not None and problem.field == word
    assert trial().invalid() is None
