"""Every policy fires, decides before the step, and within its bounds."""

from __future__ import annotations

import math

import pytest

from kha_train.stability.monitor import Monitor
from kha_train.stability.policy import Decision, Policy
from kha_train.stability.zclip import THRESHOLD, ZClip


def policy(name: str, **bounds: int) -> Policy:
    """A policy with small bounds."""
    return Policy(name, **{"max_nonfinite_steps": 4, "max_skips": 3, "rewind_after": 11, "max_rewinds": 1} | bounds)


@pytest.fixture
def decided(observed):
    """`decided(policy, losses, norms=None)`: the decision about every step."""

    def run(which: Policy, losses: list[float], norms: list[float] | None = None) -> list[Decision]:
        monitor = Monitor()
        return [which.decide(monitor.update(seen)) for seen in observed(losses, norms)]

    return run


@pytest.mark.parametrize("name", ["observe", "skip", "rewind", "abort"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_policy_applies_a_step_that_is_not_finite(name: str, value: float, decided, calm) -> None:
    losses = calm(200)
    losses[150] = value
    norms = [1.0 + 0.01 * (step % 7) for step in range(200)]
    norms[160] = value if value == math.inf else 1.0
    decisions = decided(policy(name), losses, norms)
    refused = [step for step, decision in enumerate(decisions) if not decision.apply]
    assert refused == [150, 160] if value == math.inf else [150]
    assert {decision.then for decision in decisions} == {"go on"}


@pytest.mark.parametrize("name", ["observe", "skip", "abort"])
def test_so_many_non_finite_steps_in_a_row_end_the_run(name: str, decided, calm) -> None:
    decisions = decided(policy(name), [*calm(100), *[math.nan] * 4])
    assert [decision.then for decision in decisions[-4:]] == ["go on"] * 3 + ["abort"]
    assert "4 steps in a row" in decisions[-1].reason
    interrupted = decided(policy(name), [*calm(100), *[math.nan] * 3, 3.0, *[math.nan] * 3])
    assert {decision.then for decision in interrupted} == {"go on"}


def test_observe_applies_whatever_is_finite(decided, calm) -> None:
    losses = calm(400)
    losses[200:206] = [40.0] * 6
    assert set(decided(policy("observe"), losses)) == {Decision(True)}


def test_skip_discards_flagged_steps_and_only_so_many_in_a_row(decided, calm) -> None:
    losses = calm(300)
    losses[150:152] = [5.0, 5.0]
    losses[200:206] = [5.0] * 6
    refused = [step for step, decision in enumerate(decided(policy("skip"), losses)) if not decision.apply]
    assert refused == [150, 151, 200, 201, 202]


def test_skip_discards_a_gradient_that_stands_out_by_itself(decided, calm) -> None:
    norms = [1.0 + 0.01 * (step % 7) for step in range(200)]
    norms[180] = 9.0
    decisions = decided(policy("skip"), calm(200), norms)
    assert [step for step, decision in enumerate(decisions) if not decision.apply] == [180]
    assert "gradient norm" in decisions[180].reason


def test_rewind_is_asked_for_when_a_spike_lasts_and_then_the_run_ends(decided, calm) -> None:
    losses = [*calm(200), *[4.0] * 10, *calm(100), *[4.0] * 11]
    which = policy("rewind")
    decisions = decided(which, losses)
    assert [step for step, decision in enumerate(decisions) if decision.then != "go on"] == [320]
    assert decisions[320].then == "rewind" and not decisions[320].apply
    which.rewinds = 1
    last = decided(which, losses)[320]
    assert last.then == "abort" and "after 1 rewinds" in last.reason


def test_rewind_answers_divergence_and_non_finite_steps_too(decided, calm) -> None:
    diverging = decided(policy("rewind", rewind_after=1000), [*calm(200), *[7.0] * 5])
    assert diverging[-1].then == "rewind" and diverging[-2].then == "go on"
    not_finite = decided(policy("rewind", rewind_after=1000), [*calm(200), *[math.nan] * 4])
    assert not_finite[-1].then == "rewind"


def test_abort_ends_a_run_whose_loss_is_twice_its_mean_five_times(decided, calm) -> None:
    decisions = decided(policy("abort"), [*calm(200), *[7.0] * 4, 3.0, *[7.0] * 5])
    assert [step for step, decision in enumerate(decisions) if decision.then == "abort"] == [209]


@pytest.mark.parametrize("name", ["observe", "skip", "rewind", "abort"])
@pytest.mark.parametrize("planned", [True, False])
def test_a_planned_jump_of_the_loss_makes_no_policy_act(planned: bool, name: str, observed, calm) -> None:
    monitor, which = Monitor(), policy(name, rewind_after=1000, max_skips=3)
    losses = [*calm(200, level=1.4), *calm(200, seed=1, level=3.0)]
    verdicts = [monitor.update(seen, planned and seen.step == 201) for seen in observed(losses)]
    assert [step for step, verdict in enumerate(verdicts, 1) if verdict.diverged] == ([] if planned else [205])
    acted = [decision for decision in map(which.decide, verdicts) if decision != Decision(True)]
    assert bool(acted) == (not planned and name != "observe")


def test_the_guard_watches_again_after_a_planned_jump(observed, calm) -> None:
    monitor = Monitor()
    losses = [*calm(200, level=1.4), *calm(150, seed=1, level=3.0), *[7.0] * 5]
    verdicts = [monitor.update(seen, seen.step == 201) for seen in observed(losses)]
    assert [step for step, verdict in enumerate(verdicts, 1) if verdict.diverged] == [355]


def test_the_counters_come_back_from_a_checkpoint() -> None:
    one, other = policy("skip"), policy("skip")
    one.skips_in_a_row, one.rewinds = 2, 1
    other.restore(one.state())
    assert other == one


def test_zclip_leaves_usual_norms_alone_and_bounds_the_others() -> None:
    clip = ZClip()
    norms = [1.0 + 0.1 * (step % 5) for step in range(25)]
    assert [clip.limit(norm) for norm in norms] == norms
    mean = sum(norms) / 25
    deviation = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / 25)
    assert clip.mean == pytest.approx(mean) and math.sqrt(clip.variance) == pytest.approx(deviation)
    norm = mean + 10 * deviation
    assert clip.limit(norm) == pytest.approx(mean + THRESHOLD**2 / 10 * deviation)
    # The statistics took the clipped norm: the next one that is usual passes.
    assert ZClip.restore(clip.state()).limit(mean) == clip.limit(mean) == mean
