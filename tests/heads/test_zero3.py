"""Inserted heads train under DeepSpeed's ZeRO 3 as under plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

INTERACTIONS = ["kha_mlp", "kha_linear", "mea"]


@pytest.fixture(scope="module")
def answers(run_ranks: Callable[..., list[Any]]) -> dict[str, Any]:
    return run_ranks(Path(__file__).with_name("zero3_worker.py"), 1, interactions=INTERACTIONS)[0]


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_two_steps_with_every_parameter_partitioned_are_those_of_plain_pytorch(interaction: str, answers) -> None:
    plain, zero3 = answers[interaction]["plain"], answers[interaction]["zero3"]
    assert zero3["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert plain["losses"][1] < plain["losses"][0]
    assert zero3["heads"].keys() == plain["heads"].keys()
    for name, expected in plain["heads"].items():
        found, expected = torch.tensor(zero3["heads"][name]), torch.tensor(expected)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        start = torch.ones_like(expected) if expected.ndim == 1 else torch.eye(len(expected))
        assert not torch.equal(expected, 0 * start if name.endswith("gate") else start), name


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_partitioned_parameters_are_neither_folded_nor_saved(interaction: str, answers) -> None:
    folding, saving = answers[interaction]["zero3"]["refused"]
    assert "not linear" in folding if interaction == "kha_mlp" else "is not a whole" in folding
    assert "layers.0.self_attn.kha" in saving and "is not a whole tensor here" in saving
