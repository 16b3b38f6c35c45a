"""A step that the gate refuses leaves no trace: not in masters, moments or biases, and not in any later step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("discard_worker.py")
PRECISIONS = {
    "fp32": ["engine.precision=fp32"],
    "bf16": ["engine.precision=bf16", "engine.grad_accum_dtype=bf16"],
    "bf16 accumulated in fp32": ["engine.precision=bf16", "engine.grad_accum_dtype=fp32"],
}
CASES = [
    f"zero{stage}, {precision}, accumulation {accumulation}"
    for stage, precision, accumulation in product((1, 2, 3), PRECISIONS, (1, 2))
]


@pytest.fixture(scope="module")
def answers(small: list[str], run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What two ranks answered for every combination, and for a step whose gradient is not finite."""
    cases = {}
    for stage, (precision, settings), accumulation in product((1, 2, 3), PRECISIONS.items(), (1, 2)):
        overrides = [
            *small,
            "model.layers=1",
            "model.seq_len=32",
            "attention=kha_mlp",
            f"engine=zero{stage}",
            f"engine.micro_batch_size={4 // accumulation}",
            *settings,
        ]
        cases[f"zero{stage}, {precision}, accumulation {accumulation}"] = (overrides, 1.0)
        if accumulation == 2:
            cases[f"zero{stage}, {precision}, not finite"] = (overrides, math.inf)
    return run_ranks(WORKER, 2, cases=cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_finite_step_that_is_discarded_leaves_no_trace(case: str, answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer[case].pop("norm") > 0
        assert answer[case] == {
            "changed by the refused step": [],
            "losses equal": True,
            "end states differ in": [],
            "training moved": True,
        }


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(stage: int, precision: str, answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        found = answer[f"zero{stage}, {precision}, not finite"]
        assert found["norm"] == math.inf
        assert found["changed by the refused step"] == []
        assert found["losses equal"]
        assert found["end states differ in"] == []
