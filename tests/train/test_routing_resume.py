"""What routing remembers between steps survives a resume: selection biases, the last step's loads, the warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kha_train import compose
from kha_train.record import TIMING_KEYS, read_metrics
from kha_train.train.run import train

pytestmark = pytest.mark.slow

STEPS = 4
ROUTING = [
    "moe.auxiliary_loss.weight=0.1",
    "moe.auxiliary_loss.scope=previous_step",
    "moe.z_loss_weight=0.01",
    "moe.routing_warmup_steps=3",
    "moe.dense_layers=1",
    "moe.dense_width=64",
    "moe.shared_experts=1",
]


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The record without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in read_metrics(run_dir)]


def test_a_run_stopped_after_every_step_goes_on_bit_for_bit(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    overrides = [*small, *ROUTING, f"run.steps={STEPS}", "run.name=one", "optim.lr=3e-3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(compose([*overrides, f"run.dir={whole}"])).finished
    for _ in range(STEPS - 1):
        broken.mkdir(exist_ok=True)
        (broken / "STOP").write_text("")
        assert not train(compose([*overrides, f"run.dir={broken}"])).finished
    assert train(compose([*overrides, f"run.dir={broken}"])).finished
    expected, found = curve(whole), curve(broken)
    assert found == expected and len(found) == STEPS
    assert all(line["moe/auxiliary_loss"] > 0.5 and len(line["moe/maxvio_by_layer"]) == 1 for line in found)
