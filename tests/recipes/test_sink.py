"""The recipe of a telemetry sink: one file; then `telemetry.sinks` knows it, beside the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kha_train.record import read_metrics

FILE = "kha_train/telemetry/loss_file.py"


def test_a_sink_of_one_file_is_chosen_by_its_name_and_told_every_step(
    follow: Callable[[str], Any], small: list[str], tmp_path: Path
) -> None:
    recipe = follow("a telemetry sink")
    assert recipe.touched() == [FILE]
    recipe.run("ruff", "check", FILE)
    assert "loss_file" in recipe.type_commands()
    run_dir = tmp_path / "run"
    recipe.run("kha", "train", *small, "telemetry.sinks=[loss_file]", "run.steps=2", f"run.dir={run_dir}")
    expected = [f"{line['step']} {line['train/loss']}" for line in read_metrics(run_dir)]
    assert len(expected) == 2 and (run_dir / "loss.txt").read_text().splitlines() == expected
    assert not (run_dir / "wandb").exists()
