"""The recipe of an evaluation task: a file and a registry line; then a run measures it, and a comparison shows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.record import read_metrics

MODULE = "kha_train/evaluate/accuracy.py"


@pytest.mark.slow
def test_two_files_make_a_task_that_runs_record_and_comparisons_show(
    follow: Callable[[str], Any], small: list[str], tmp_path: Path
) -> None:
    recipe = follow("an evaluation task")
    assert recipe.touched() == [MODULE, "kha_train/variants/registry.py"]
    recipe.run(sys.executable, "-m", "ruff", "check", MODULE)
    # Of one bucket that takes every label, `context` has the same share; tests/evaluate holds it against torch.
    tasks = "evaluation.tasks=[{name: accuracy, every_steps: 2}, {name: context, borders: [1], every_steps: 2}]"
    short = ["model.layers=1", "data.global_batch_size=4", "engine.micro_batch_size=4", "optim.lr=0.01"]
    runs = [tmp_path / name for name in ("gqa", "mha")]
    for run in runs:
        variant = [f"attention={run.name}", f"run.dir={run}", "run.steps=5", "engine.device=cpu"]
        recipe.run("kha", "train", *small, *short, *variant, tasks)
    lines = read_metrics(runs[0])
    measured = {line["step"]: line["evaluation/accuracy/top1"] for line in lines if "evaluation/accuracy/top1" in line}
    assert measured == {
        line["step"]: line["evaluation/context/accuracy_from_1"] for line in lines if line["step"] in (2, 4, 5)
    }
    assert any(measured.values()), "the model is right now and then: the test would show little"
    answer = json.loads(recipe.run("kha", "compare", *map(str, runs), "--out", str(tmp_path / "report"), "--json"))
    shares = answer["evaluations"]["evaluation/accuracy"]["figures"]["top1"]
    assert shares == [read_metrics(run)[-1]["evaluation/accuracy/top1"] for run in runs]
