"""Our collectives on a CPU give what torch's give, and post every receive before a send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("collectives_worker.py")


@pytest.fixture(scope="module", params=[1, 2, 3])
def answers(request: pytest.FixtureRequest, run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """The results of each rank."""
    return run_ranks(WORKER, request.param)


def test_every_exchange_gives_what_torchs_gives(answers: list[dict[str, Any]]) -> None:
    """Equal parts, uneven and empty ones, integers, bf16, and numbers that want a gradient."""
    for answer in answers:
        assert len(answer["exchanges"]) == 5 and all(answer["exchanges"].values()), answer["exchanges"]


def test_a_gather_gives_what_torchs_gives_even_into_the_memory_that_holds_the_part(
    answers: list[dict[str, Any]],
) -> None:
    assert all(answer["gathers"] == {"apart": True, "inside": True} for answer in answers)


def test_shares_are_sums_in_the_order_of_ranks_bit_for_bit(answers: list[dict[str, Any]]) -> None:
    assert all(answer["scattered"] for answer in answers)


def test_a_rank_posts_all_receives_before_it_sends_to_the_next_one_first(answers: list[dict[str, Any]]) -> None:
    """Otherwise gloo uses the two directions of a link one after the other."""
    size = len(answers)
    for rank, answer in enumerate(answers):
        others = [(rank + turn) % size for turn in range(1, size)]
        assert answer["posted"] == [f"{way} {other}" for way in ("irecv", "isend") for other in others]


def test_rows_that_do_not_divide_are_refused_on_every_rank(answers: list[dict[str, Any]]) -> None:
    assert [answer["refused"] for answer in answers] == [len(answers) > 1] * len(answers)


def test_a_rank_that_waits_for_a_gather_is_seen_to_wait(answers: list[dict[str, Any]]) -> None:
    assert [answer["seen_waits"] > 0 for answer in answers] == [len(answers) > 1] * len(answers)
