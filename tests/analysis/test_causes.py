"""Verdicts follow from which changes remove an event, and by how much."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kha_train.analysis.causes import (
    Arm,
    Excess,
    Verdict,
    excess,
    is_removed,
    judge,
    read_verdicts,
    share_left,
    words_of,
)
from kha_train.record.files import write_json
from kha_train.stability.events import SpikeEvent


def event(baseline: float = 2.0, scale: float = 0.125) -> SpikeEvent:
    return SpikeEvent(5, 7, 0, 0.1, 40, 63, baseline, scale, 1.0)


def lines(*losses: float) -> list[dict[str, float]]:
    return [{"step": step, "train/loss": loss, "train/grad_norm": 1.0} for step, loss in enumerate(losses, start=4)]


def arm(name: str, family: str, removed: bool | tuple[bool, ...], left: float = 0.0) -> Arm:
    each = removed if isinstance(removed, tuple) else (removed,)
    return Arm(name, family, f"with {name}", f"what {name} accuses", each, (left,) * len(each))


def test_an_event_is_measured_from_its_own_baseline_and_over_its_own_steps() -> None:
    # Step 9 is after the replay. z = 7, 8, and one loss that is not finite.
    found = excess(lines(2.0, 2.875, 3.0, math.nan, 1.0, 9.0), event(), before=2, last=8)
    assert found == Excess(standing_out=2, area=1.875)
    assert excess([{"step": 5, "train/loss": 2.0, "train/grad_norm": math.inf}], event(), 4, 5).standing_out == 1


def test_a_replay_that_diverged_before_the_event_does_not_remove_it() -> None:
    control = excess(lines(2.0, 3.5, 3.5, 2.0, 2.0), event(), 3, 8)
    early, amid = excess(lines(2.0), event(), 3, 8), excess(lines(2.0, 2.0), event(), 3, 8)
    assert (early.standing_out, amid.standing_out) == (4, 3)
    assert not is_removed(early, control) and not is_removed(amid, control)
    lost = Arm("order", "data", "with order", "order", (False,), (share_left(early, control),))
    assert lost.words == "does not remove it"
    assert judge([lost])[1] == "no single cause: none of 1 changes removes it"
    assert judge([lost, arm("rate", "rate", False, 0.9)])[1].endswith("effective, with rate, leaves 90 % of it")


def test_a_change_that_moves_the_event_to_the_step_before_does_not_remove_it() -> None:
    """As leaving out the batch of that step does: the bad one comes then."""
    control = excess(lines(2.0, 3.5, 2.0), event(), 3, 6)
    moved = excess(lines(3.5, 2.0, 2.0), event(), 3, 6)
    assert moved == control and not is_removed(moved, control)
    # A replay that begins with the event has no such step.
    assert excess(lines(3.5, 2.0, 2.0)[1:], event(), before=4, last=6) == Excess(0, 0.0)


def test_a_change_removes_an_event_when_nothing_stands_out_and_most_of_it_is_gone() -> None:
    control = Excess(1, 0.9)
    assert is_removed(Excess(0, 0.45), control) and not is_removed(Excess(0, 0.46), control)
    assert not is_removed(Excess(1, 0.0), control)
    # An event of non-finite losses alone has no area.
    assert is_removed(Excess(0, 0.0), Excess(3, 0.0)) and share_left(Excess(1, 0.0), Excess(4, 0.0)) == 0.25


@pytest.mark.parametrize(
    ("arms", "cause", "begins"),
    [
        ([("batch", "data", True), ("order", "data", True), ("rate", "rate", False)], "data", "what batch accuses"),
        ([("batch", "data", False), ("window", "data", True), ("rate", "rate", False)], "data", "what window accuses"),
        ([("rate", "rate", True), ("clip", "clipping", True)], "rate", "what rate accuses"),
        ([("clip", "clipping", True), ("rate", "rate", False)], "clipping", "what clip accuses"),
        ([("router", "router precision", True), ("all", "precision", True)], "router precision", "what router accuses"),
        ([("order", "data", (True, False, True)), ("rate", "rate", True)], "rate", "what rate accuses"),
        ([("batch", "data", True), ("rate", "rate", True)], None, "no single cause: each of these changes removes it"),
        ([("batch", "data", False), ("rate", "rate", False)], None, "no single cause: none of 2 changes removes it"),
        ([("batch", "data", True), ("rounding", "rounding", True)], None, "no single cause: even another rounding"),
        ([], None, "no verdict"),
    ],
)  # fmt: skip
def test_a_single_cause_is_named_and_any_other_event_is_called_one_without(arms, cause, begins) -> None:
    found, answer = judge([arm(*one) for one in arms])
    assert found == cause and answer.startswith(begins)


def test_a_cause_says_what_it_was_not_held_against() -> None:
    clip, rate, other = (
        arm(*one) for one in (("clip", "clipping", True), ("rate", "rate", False), ("rounding", "rounding", False))
    )
    assert judge([clip])[1].endswith(
        "; nothing else was tried; not held against another rounding, which may remove it too"
    )
    assert judge([clip, rate])[1].endswith(
        "1 other change does not; not held against another rounding, which may remove it too"
    )
    assert judge([clip, rate, other])[1].endswith("2 other changes do not")


def test_an_arm_that_was_not_replayed_removes_nothing_and_says_why() -> None:
    idle = Arm("router", "router precision", "", "", reason="the router is fp32 already")
    assert not idle.removes and idle.words == "not replayed: the router is fp32 already"
    assert arm("order", "data", (True, False), 0.5).words == "removes it in 1 of 2 replays; 50 % of it left"


def test_verdicts_are_read_as_they_were_written_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (30, 7):
        made = Verdict("id", step, step, 1, 40, "", "chance", None, (), (arm("rate", "rate", True, math.nan),))
        (tmp_path / "replay" / f"step-{step:08d}").mkdir(parents=True)
        write_json(tmp_path / "replay" / f"step-{step:08d}" / "verdict.json", made.to_dict())
    found = read_verdicts(tmp_path)
    assert [one["start_step"] for one in found] == [7, 30]
    assert words_of(found[0]["arms"][0]) == "removes it"
    assert read_verdicts(tmp_path / "nowhere") == []
