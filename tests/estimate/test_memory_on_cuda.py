"""The planned memory of a step on CUDA against what torch's own allocator took, on a device whose kernels do nothing.

`tools/null_gpu/memory.py` measured the table; docs/plan.md says how.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kha_train.config.compose import compose
from kha_train.estimate.memory import plan_memory

ROWS = json.loads(Path(__file__).with_name("null_gpu_memory.json").read_text(encoding="utf-8"))["rows"]
QUICK = 3


def test_the_table_has_models_stages_recipes_and_variants_enough() -> None:
    assert len(ROWS) >= 20 and len({row["overrides"] for row in ROWS}) == len(ROWS)
    told = " ".join(row["overrides"] for row in ROWS)
    models = ("moe_6b", "qwen3_30b", "kha_mlp", "mla")
    for part in (*models, "zero1", "zero2", "zero3", "h200_1x1", "full", "selective", "bf16", "expert_", "context_"):
        assert part in told, part


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if number < QUICK else pytest.mark.slow) for number, row in enumerate(ROWS)],
    ids=lambda row: row["overrides"],
)
def test_planned_memory_is_within_3_percent_of_allocated_and_5_of_reserved(row: dict) -> None:
    planned = plan_memory(compose(row["overrides"].split()))
    assert planned.allocated == pytest.approx(row["allocated"], rel=0.03)
    assert planned.total == pytest.approx(row["reserved"], rel=0.05)
