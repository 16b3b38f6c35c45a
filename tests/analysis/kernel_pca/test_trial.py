"""What `kha kernel-pca` measures, on problems whose answer is known, and its page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kha_train.analysis.kernel_pca.algorithms import CentredKernel, Gain, KernelHebbian, gaussian, reconstruction_error
from kha_train.analysis.kernel_pca.digits import load_digits
from kha_train.analysis.kernel_pca.trial import (
    Problem,
    Streamed,
    denoise,
    median_distance,
    normalised,
    passes_of,
    purity,
    solve,
    walk,
)
from kha_train.cli.main import build
from kha_train.errors import ConfigError


def test_purity_is_the_share_of_the_most_common_label_of_each_group() -> None:
    assert purity(np.array([0, 0, 0, 1, 1, 2]), np.array([7, 7, 3, 3, 3, 7])) == 5 / 6


def test_the_affinity_is_that_of_ng_jordan_and_weiss_times_the_number_of_vectors() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    plain = gaussian(1.0)(x, x)
    scale = np.diag(plain.sum(1) ** -0.5)
    np.testing.assert_allclose(normalised(gaussian(1.0), x)(x, x), 20 * scale @ plain @ scale, rtol=1e-12)


def test_the_median_distance_leaves_out_the_distance_to_itself() -> None:
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == 2.0


def test_limbs_of_the_walk_keep_their_length_and_it_repeats_every_60_frames() -> None:
    markers = walk(120).reshape(120, 2, 3, 2)
    thigh, shin = (np.linalg.norm(markers[:, :, i + 1] - markers[:, :, i], axis=-1) for i in (0, 1))
    np.testing.assert_allclose(thigh, 0.45, rtol=1e-12)
    np.testing.assert_allclose(shin, 0.42, rtol=1e-12)
    np.testing.assert_allclose(markers[:60], markers[60:], atol=1e-12)
    np.testing.assert_allclose(markers[:30, 0], markers[30:60, 1], atol=1e-12)
    # Knees bend in one direction.
    thigh, shin = (markers[:, :, i + 1] - markers[:, :, i] for i in (0, 1))
    bend = thigh[..., 0] * shin[..., 1] - thigh[..., 1] * shin[..., 0]
    assert (bend <= 1e-12).all() and bend.min() < -0.1


def test_the_tuned_gain_is_the_best_of_the_grid_and_every_pass_is_told() -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    told: list[int] = []
    problem = solve(x, gaussian(1.0), 2, 4, 2, told.append)
    assert sum(told) == 4 * 5 * (2 * 12 + 2) and passes_of(4, 2, 1) == 4 * 5 * (2 * 2 * 12 + 2 + 1)
    for one in problem.streamed.values():
        assert np.shape(one.errors) == (2, 4) and (np.array(one.errors)[:, -1] < 0.5).all() and not one.at_edge
        assert (np.diff(one.seconds) > 0).all()
    kernel = problem.kernel

    def end(eta0: float) -> float:
        """The error of KHA/et in the worse of the two seeds that tune."""
        gain = Gain(kind="et", eta0=eta0)
        with np.errstate(all="ignore"):
            states = [[*KernelHebbian(kernel, 2, gain).passes(4, seed)][-1] for seed in (100, 101)]
            return float(np.max([reconstruction_error(state.a_RN, kernel.matrix()) for state in states]))

    assert end(4.0) < end(2.0) < end(1.0) and not np.isfinite(end(8.0))
    assert problem.streamed["et"].eta0 == 2.0, "the best whose double does not diverge"


def test_a_method_that_diverged_cleans_nothing() -> None:
    source = np.random.default_rng(0)
    x = source.normal(size=(30, 2))
    exact = np.linalg.eigh(gaussian(1.0)(x, x))[1].T[-2:]
    lost = Streamed(1.0, False, ((np.nan,),), ((1.0,),), np.full((2, 30), np.nan))
    problem = Problem(CentredKernel(x, gaussian(1.0)), exact, 0.0, (1.0, 1.0), {"smd": lost})
    errors = denoise(problem, 1.0, x, x[:5], x[:5] + 0.1).errors()
    assert np.isnan(errors["smd"]) and np.isfinite([errors["noisy"], errors["exact"]]).all()


def test_without_scikit_learn_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match="needs scikit-learn") as refused:
        load_digits(10, 0)
    assert refused.value.fix == "pip install 'kha_train[lab]'"


@pytest.mark.slow
def test_the_command_writes_its_numbers_and_one_page_without_outside_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("kha_train.analysis.kernel_pca.trial.ETA_POWERS", (-3, -2))
    options = ["--count", "60", "--components", "4", "--passes", "2", "--seeds", "1", "--json"]
    page = tmp_path / "page.html"
    for _ in range(2):
        ended = CliRunner().invoke(build(["kernel-pca"]), ["kernel-pca", "--out", str(page), *options])
        assert ended.exit_code == 0, ended.output
    answer = json.loads(ended.stdout)
    assert set(answer["purity"]) == {"exact", "constant", "t", "et", "et_normalised", "smd"}
    assert len(answer["digits"]["eigenvalues"]) == 4 and all(0.1 < one <= 1 for one in answer["purity"].values())
    assert answer["denoised_walk"]["exact"] < answer["denoised_walk"]["noisy"]
    text = page.read_text()
    assert text.count("<svg") > 8 and not re.search(r'(src|href)="(?!#|data:)', text)
    page.write_text("somebody's")
    with pytest.raises(ConfigError):
        CliRunner().invoke(build(["kernel-pca"]), ["kernel-pca", "--out", str(page), *options], catch_exceptions=False)
    with pytest.raises(ConfigError, match="not as many digits"):
        load_digits(1798, 0)
