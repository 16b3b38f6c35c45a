"""Ranks score parts of the rows, and come to what one rank makes of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train import compose, distributed
from kha_train.engine import plain
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.scoring import evaluate


@pytest.mark.slow
def test_two_ranks_of_any_zero_stage_or_with_shared_rows_come_to_the_figures_of_one(
    small: list[str], dataset: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    """The named set has 7 rows, the last micro-batch of two ranks one row and fillers, then fillers alone."""
    tasks = "evaluation.tasks=[context, {name: bits_per_byte, set: code, rows: 7}]"
    sets = f"validation.sets=[{{name: code, path: {dataset}/train}}]"
    settings = ["validation.rows=5", "engine.micro_batch_size=3", "data.global_batch_size=6", "attention=kha_mlp"]
    overrides = [*small, sets, tasks, *settings, "engine.device=cpu"]
    config = compose(overrides)
    engine = plain.Engine(config, distributed.start("cpu", 60))
    alone = evaluate(engine, open_tasks(config))
    engine.close()
    plain.Engine.leave_world()
    assert len(alone) >= 12
    first, second = run_ranks(Path(__file__).with_name("ranks_worker.py"), 2, overrides=overrides)
    assert first == second and len(first) == 4
    for layout in first:
        assert first[layout] == pytest.approx(alone, rel=1e-5), layout
