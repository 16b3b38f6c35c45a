"""Kernel PCA of head outputs: the outputs are those that the output projection reads, and shares are of variance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kha_train import build_decoder, compose
from kha_train.analysis.heads.observe import Observer
from kha_train.analysis.heads.probe_rows import open_probe
from kha_train.analysis.kernel_pca.heads import between_groups, head_components
from kha_train.cli.main import build
from kha_train.errors import ConfigError
from kha_train.train.run import train


def test_the_share_between_heads_is_that_of_an_analysis_of_variance() -> None:
    coordinates = np.array([[1.0, 0.0], [1.0, 2.0], [3.0, 0.0], [3.0, 2.0]])
    np.testing.assert_allclose(between_groups(coordinates, np.array([0, 0, 1, 1])), [1.0, 0.0])
    mixed = np.array([[0.0], [2.0], [3.0], [5.0]])
    # Means 1 and 4 around 2.5: 4 x 1.5^2 of 6.25 + 0.25 + 0.25 + 6.25.
    np.testing.assert_allclose(between_groups(mixed, np.array([0, 0, 1, 1])), [9 / 13])


def test_outputs_of_a_layer_are_what_its_output_projection_turns_into_the_layers_result(small: list[str]) -> None:
    config = compose([*small, "model.layers=2"])
    decoder, probe = build_decoder(config).eval(), open_probe(config, 128)
    observer = Observer(decoder, probe.batches, lambda: None)
    outputs_NHW = observer.outputs(1)
    assert outputs_NHW.shape[0] == probe.about.tokens and not torch.equal(outputs_NHW, observer.outputs(0))
    for mean_HW, layer in zip(observer.mean_outputs(), (0, 1), strict=True):
        torch.testing.assert_close(observer.outputs(layer).double().mean(0), mean_HW.double(), atol=1e-7, rtol=1e-5)


def test_the_command_solves_the_outputs_of_a_runs_newest_checkpoint(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kha_train.analysis.kernel_pca.trial.ETA_POWERS", (-3, -2))
    run = tmp_path / "run"
    train(compose([*small, "model.layers=1", "engine.name=plain", "run.steps=1", f"run.dir={run}"]))
    options = [
        "--out",
        str(tmp_path / "page.html"),
        "--count",
        "48",
        "--components",
        "4",
        "--passes",
        "2",
        "--seeds",
        "1",
    ]
    ended = CliRunner().invoke(build(["kernel-pca"]), ["kernel-pca", str(run), *options, "--json"])
    assert ended.exit_code == 0, ended.output
    answer = json.loads(ended.stdout)
    assert (answer["step"], answer["heads"], answer["vectors"]) == (1, 4, 48)
    assert 0 < sum(answer["shares"]) < 1 and all(0 <= one <= 1 for one in answer["between_heads"])
    assert "4 heads of layer 0 after 1 steps" in (tmp_path / "page.html").read_text()
    with pytest.raises(ConfigError, match="no such layer"):
        head_components(run, 1, 48, 4, 2, 1, lambda passes: None)
