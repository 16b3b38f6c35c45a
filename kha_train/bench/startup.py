"""Measures `kha train` from the command to the end of the first step: whole starts one after another, each a process.

The phases are those that every run records in `run.json` as `startup_seconds`. The data are synthetic. W&B is off
unless requested, because a key or a network would change the figure.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.synthetic import write_dataset
from kha_train.bench import protocol
from kha_train.config.compose import compose
from kha_train.errors import KhaError


def measure(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Median seconds of every phase, and of whole runs of two steps with their validation, checkpoint and end.

    Raises KhaError when a run fails, and as `compose`.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        settings = ["telemetry.wandb.mode=disabled", *overrides, "run.steps=2", "validation.rows=8"]
        write_dataset(root / "data", vocab_size=compose(settings).model.vocab_size, documents=800)
        settings += [f"data.train={root}/data/train", f"data.validation={root}/data/validation"]
        starts = [_start([*settings, f"run.dir={root}/run{number}"], root / f"run{number}") for number in range(rounds)]
    phases = {name: statistics.median(start["phases"][name] for start in starts) for name in starts[0]["phases"]}
    return {
        "first_step_seconds": statistics.median(sum(start["phases"].values()) for start in starts),
        "whole_run_seconds": statistics.median(start["whole"] for start in starts),
        "phases": phases,
        "rounds": rounds,
        "environment": protocol.environment(torch.device("cpu")),
    }


def format_measured(found: dict[str, Any]) -> str:
    """The figures and their protocol, as text."""
    head = (
        f"{found['first_step_seconds']:.1f} s to the end of the first step, {found['whole_run_seconds']:.1f} s a run "
        f"of two; medians of {found['rounds']} starts; {protocol.told(found['environment'])}"
    )
    return "\n".join([head] + [f"  {name:<34} {seconds:6.2f} s" for name, seconds in found["phases"].items()])


def _start(settings: list[str], run_dir: Path) -> dict[str, Any]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "kha_train", *settings]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    whole = time.perf_counter() - started
    if ended.returncode:
        raise KhaError(f"kha train ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return {"phases": json.loads((run_dir / "run.json").read_text())["startup_seconds"], "whole": whole}
