"""The routing state survives a resume: selection biases, the last step's loads, the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train import compose
from kha_train.checkpoint.reader import find_newest
from kha_train.distributed import World
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


def test_a_run_stopped_after_every_step_goes_on_bit_for_bit(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: Callable[[Path], list[dict[str, Any]]]
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


def test_a_new_run_takes_the_selection_biases_of_another_but_begins_its_own_routing_warm_up(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    overrides = [*small, *ROUTING, "validation.every_steps=0"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(compose([*overrides, f"run.dir={first}", f"run.steps={STEPS}", "moe.bias_update_rate=0.1"]))
    train(compose([*overrides, f"run.dir={second}", "run.steps=1", f"run.init_from={first}", "moe.bias_update_rate=0"]))
    before, after = (find_newest(run_dir, World.single(), print).buffers() for run_dir in (first, second))
    counters = [name for name in after if name.endswith("steps_done")]
    biases = [name for name in after if name.endswith("selection_bias")]
    assert counters and biases
    assert all(before[name].item() == STEPS and after[name].item() == 1 for name in counters)
    assert all(before[name].any() and torch.equal(before[name], after[name]) for name in biases)
