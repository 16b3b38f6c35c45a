"""`kha metrics`: what the numbers of a run mean, before it starts and afterwards."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kha_train import compose
from kha_train.cli.main import app
from kha_train.record import read_metrics
from kha_train.train.run import train

OLD_RUN = Path(__file__).resolve().parents[1] / "fixtures" / "old_runs" / "runs" / "gqa"


def listed(*arguments: str) -> dict[str, dict[str, object]]:
    """The answer of `kha metrics` in JSON."""
    answer = CliRunner().invoke(app, ["metrics", *arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    found: dict[str, dict[str, object]] = json.loads(answer.stdout)
    return found


def test_it_lists_what_the_settings_record_and_what_a_run_declared(small: list[str], tmp_path: Path) -> None:
    settings = [*small, "engine.name=plain", "run.steps=1", "telemetry.layer_statistics_every=1"]
    train(compose([*settings, f"run.dir={tmp_path / 'run'}"]))
    before, after = listed(*settings), listed("--run", str(tmp_path / "run"))
    assert before == after
    assert read_metrics(tmp_path / "run")[-1].keys() <= after.keys()
    assert after["train/loss"]["unit"] == "nats/token" and after["train/loss"]["meaning"]
    old = listed("--run", str(OLD_RUN))
    assert old["train/loss"]["unit"] == "nats/token" and "layer/grad_norm" not in old
