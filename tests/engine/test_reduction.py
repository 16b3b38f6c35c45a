"""Gradients are summed to shares beside the backward: in which order, in which dtype, and once a step under ZeRO 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("reduction_worker.py")
CASES = (
    "ZeRO 1",
    "ZeRO 2",
    "ZeRO 1, bf16 summed in fp32",
    "ZeRO 2, bf16 summed in fp32",
    "ZeRO 2, bf16",
    "ZeRO 2, after the backward",
)
RANKS = 3
"""So that groups need padding, and the order of a sum matters."""
MATRIX, VECTORS = 30, 24
"""Numbers of a group, with padding: a map of 5 x 5, and four vectors of 5."""


@pytest.fixture(scope="module")
def answers(run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What each rank answered."""
    return run_ranks(WORKER, RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_share_is_the_sum_by_hand_bit_for_bit(case: str, answers: list[dict[str, Any]]) -> None:
    """In the order of ranks; a parameter that a rank did not use counts as zero there."""
    assert [answer[case]["wrong"] for answer in answers] == [[]] * RANKS


@pytest.mark.slow
def test_a_group_leaves_while_the_backward_computes_the_map_before(answers: list[dict[str, Any]]) -> None:
    """The last map first. The vectors of all maps leave when that of the first is there, before its matrix is."""
    later = [word for number in (3, 2, 1) for word in (f"computed {number}", f"left {MATRIX}")]
    assert answers[0]["ZeRO 2"]["events"] == [*later, f"left {VECTORS}", "computed 0", f"left {MATRIX}"] * 3


@pytest.mark.slow
def test_a_benchmark_may_let_all_groups_leave_after_the_backward(answers: list[dict[str, Any]]) -> None:
    left = [f"left {MATRIX}"] * 3 + [f"left {VECTORS}", f"left {MATRIX}"]
    computed = [f"computed {number}" for number in (3, 2, 1, 0)]
    assert answers[0]["ZeRO 2, after the backward"]["events"] == [*computed, *left] * 3


@pytest.mark.slow
def test_under_zero_1_all_leave_once_with_the_last_micro_batch(answers: list[dict[str, Any]]) -> None:
    computed = [f"computed {number}" for number in (3, 2, 1, 0)]
    events = answers[0]["ZeRO 1"]["events"]
    assert events[:8] == computed * 2 and events[8:] == answers[0]["ZeRO 2"]["events"][:9]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_groups_leave_in_the_same_order_on_a_rank_that_does_not_use_one(
    case: str, answers: list[dict[str, Any]]
) -> None:
    """A rank that sent another one first would wait for ever, or add up what does not belong together."""
    left = [[event for event in answer[case]["events"] if event.startswith("left")] for answer in answers]
    assert left[0] == left[1] == left[2]
    computed = [[event for event in answer[case]["events"] if event == "computed 2"] for answer in answers]
    assert len(computed[0]) == 3 and not computed[2], "the last rank does not use the map"
