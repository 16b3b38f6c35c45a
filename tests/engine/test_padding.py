"""A rank with nothing but padding takes part in every step of the others and adds nothing to it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("padding_worker.py")
COUNTED = ["moe.z_loss_weight=0.01", "moe.auxiliary_loss.weight=0.1"]
CASES = {
    "ZeRO 1, each row": ["engine.zero_stage=1", *COUNTED],
    "ZeRO 2, each micro-batch": ["engine.zero_stage=2", *COUNTED, "moe.auxiliary_loss.scope=micro_batch"],
    "ZeRO 3, the step before": ["engine.zero_stage=3", *COUNTED, "moe.auxiliary_loss.scope=previous_step"],
    "ZeRO 3, recomputed": ["engine.zero_stage=3", *COUNTED, "engine.activation_checkpointing=full"],
}


@pytest.fixture(scope="module")
def answers(padded: list[str], run_ranks: Callable[..., list[Any]]) -> dict[int, dict[str, Any]]:
    """Ranks -> case -> what rank 0 answered."""
    common = [*padded, "engine.micro_batch_size=2", "optim.lr=3e-3"]
    # The engine of two ranks counts rows of both, of which one half is padding.
    cases = {
        ranks: {name: [*common, *case, f"data.global_batch_size={4 * ranks}"] for name, case in CASES.items()}
        for ranks in (1, 2)
    }
    return {ranks: run_ranks(WORKER, ranks, cases=cases[ranks])[0] for ranks in (1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_of_nothing_but_padding_changes_no_step(case: str, answers: dict[int, dict[str, Any]]) -> None:
    alone, joined = answers[1][case], answers[2][case]
    for before, after in zip(alone["steps"], joined["steps"], strict=True):
        loss, norm, applied, load_LE, bias_LE, balance, z, _ = before
        assert applied and after[2]
        assert after[0] == pytest.approx(loss, abs=5e-6) and after[1] == pytest.approx(norm, rel=1e-4)
        assert after[3] == load_LE
        assert list(chain(*after[4])) == pytest.approx(list(chain(*bias_LE)), abs=1e-6)
        assert after[5:7] == pytest.approx([balance, z], rel=1e-5)
        assert balance > 0.5 and z > 0
    assert joined["validated"] == pytest.approx(alone["validated"], rel=1e-5)
    assert joined["tokens"] == alone["tokens"] < alone["places"]
    assert sum(chain(*joined["steps"][1][3])) == 2 * 2 * joined["tokens"], "two experts of each of two layers"
