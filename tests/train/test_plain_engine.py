"""The whole loop with the plain engine: train, probe, audit, validate, save and resume, as with DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.manifest import parse_manifest
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.compose import compose
from kha_train.engine import deepspeed, plain
from kha_train.record import read_events
from kha_train.train.run import train

STEPS = 6
EVIDENCE = ("train/loss", "validation/loss", "attn/max_logit", "kha/from_identity", "moe/maxvio")


@pytest.fixture
def overrides(small: list[str]) -> list[str]:
    """A run of six steps, saved at 3 and 6, with every part of the loop switched on."""
    often = ["engine.audit_every=2", "stability.probe_every=3", "validation.every_steps=3", "checkpoint.every_steps=3"]
    variant = ["attention=kha_mlp", "engine.device=cpu", "engine.micro_batch_size=2", "data.global_batch_size=8"]
    return [*small, *often, *variant, f"run.steps={STEPS}"]


def checkpoint(run_dir: Path, step: int) -> Checkpoint:
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    return Checkpoint(path, parse_manifest((path / "manifest.json").read_bytes()))


def stopped_after(run_dir: Path, step: int, overrides: list[str], engine_class: Any) -> None:
    """Train the run and take back its last steps, as a kill after `step` leaves it."""
    train(compose([*overrides, f"run.dir={run_dir}"]), engine_class=engine_class)
    for path in (run_dir / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            path.rename(path.with_name(f"{path.name}.undone"))
    (run_dir / "DONE").unlink()


def test_the_plain_engine_draws_the_curve_of_deepspeed_and_each_continues_the_others_checkpoint(
    overrides: list[str], tmp_path: Path, curve: Callable[[Path], list[dict[str, Any]]]
) -> None:
    engines = {"plain": plain.Engine, "deepspeed": deepspeed.Engine}
    for name, engine_class in engines.items():
        stopped_after(tmp_path / name, 3, overrides, engine_class)
    whole = {name: curve(tmp_path / name) for name in engines}
    assert whole["plain"][-1].keys() >= {*EVIDENCE}
    for ours, theirs in zip(*whole.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for key in {*EVIDENCE, "train/grad_norm"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key
    first, second = (checkpoint(tmp_path / name, 3) for name in engines)
    found = compare(first, second)
    assert not found.only_first + found.only_second and all(value < 1e-4 for value, _ in found.tensors.values())

    for name, other in (("plain", deepspeed.Engine), ("deepspeed", plain.Engine)):
        train(compose([*overrides, f"run.dir={tmp_path / name}"]), engine_class=other)
        assert read_events(tmp_path / name)[-1]["kind"] != "abort"
        resumed = curve(tmp_path / name)
        assert [line["train/loss"] for line in resumed] == pytest.approx(
            [line["train/loss"] for line in whole[name]], abs=1e-5
        )


def test_a_plain_run_that_was_stopped_continues_bit_for_bit(
    overrides: list[str], tmp_path: Path, curve: Callable[[Path], list[dict[str, Any]]]
) -> None:
    train(compose([*overrides, f"run.dir={tmp_path / 'whole'}"]), engine_class=plain.Engine)
    stopped_after(tmp_path / "stopped", 3, overrides, plain.Engine)
    train(compose([*overrides, f"run.dir={tmp_path / 'stopped'}"]), engine_class=plain.Engine)
    first, second = (curve(tmp_path / name) for name in ("whole", "stopped"))
    assert first == second and len(first) == STEPS
    assert not compare(checkpoint(tmp_path / "whole", STEPS), checkpoint(tmp_path / "stopped", STEPS)).tensors
