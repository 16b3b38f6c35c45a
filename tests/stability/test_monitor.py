"""A curve scored online, with stops and resumes anywhere, and the same curve scored afterwards: equal, exactly."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from kha_train.bench.spikes import spiky_curve
from kha_train.checkpoint.trainer_state import decode_state, encode_state
from kha_train.stability.events import Observation
from kha_train.stability.monitor import Monitor
from kha_train.stability.scores import Share, SignalScores


def curve(seed: int, steps: int) -> list[Observation]:
    """Every kind of disturbance in the loss, and norms that spike, vanish and overflow by themselves."""
    source = random.Random(seed)
    points = []
    for step, loss in enumerate(spiky_curve(seed, steps, "mixed").losses, start=1):
        norm = math.exp(source.gauss(0.0, 0.2)) * (30.0 if source.random() < 0.005 else 1.0)
        norm = math.inf if source.random() < 0.002 else norm
        points.append(Observation(step, loss, norm, 1000 * step, 1e-3, 8 * step, 8 * step + 7))
    return points


def told(verdict: Any) -> str:
    """Everything a verdict says, bit for bit (repr of a float reads back as itself)."""
    closed = verdict.closed.to_dict() if verdict.closed else None
    return repr((verdict._replace(closed=None), closed))


def resumed(monitor: Monitor) -> Monitor:
    """What comes back from a checkpoint file."""
    return Monitor.restore(decode_state(encode_state({"stability": monitor.state()}))["stability"])


@pytest.mark.parametrize("seed", [0, 1])
def test_online_equals_offline_with_resumes_at_random_steps(seed: int) -> None:
    points, stops = curve(seed, 6000), random.Random(seed)
    straight, broken = Monitor(), Monitor()
    inside = 0
    for point in points:
        if stops.random() < 0.02:
            inside += broken.events.event is not None
            broken = resumed(broken)
        assert told(straight.update(point)) == told(broken.update(point))
    assert straight.state() == broken.state()
    assert inside >= 5, "some resumes must fall inside an open event"


def test_a_resume_at_every_step_of_an_event_changes_nothing() -> None:
    points = curve(3, 1500)
    straight, broken = Monitor(), Monitor()
    for point in points:
        expected = straight.update(point)
        assert told(broken.update(point)) == told(expected)
        if straight.events.event is not None or expected.closed:
            broken = resumed(broken)
    assert straight.closed == broken.closed and sum(straight.closed.values()) >= 1


def test_the_published_scores_are_those_of_their_definition() -> None:
    points = curve(5, 2500)
    monitor = Monitor()
    verdicts = [monitor.update(point) for point in points]
    losses = [point.loss for point in points]
    judged = flagged = 0
    for number, loss in enumerate(losses):
        before = [value for value in losses[:number] if math.isfinite(value)]
        if len(before) >= 1000:
            mean = math.fsum(before[-1000:]) / 1000
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in before[-1000:]) / 1000)
            judged += 1
            flagged += not math.isfinite(loss) or abs(loss - mean) >= 7 * deviation
        if len(before) >= 128 and math.isfinite(loss):
            mean = math.fsum(before[-128:]) / 128
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in before[-128:]) / 128)
            assert verdicts[number].metrics["spike/z128_loss"] == pytest.approx((loss - mean) / deviation, rel=1e-7)
    assert flagged > 0
    assert verdicts[-1].metrics["spike/olmo_loss_score"] == 100 * flagged / judged


def test_the_recent_share_forgets_after_ten_thousand_steps() -> None:
    share = Share()
    share.add(True)
    for _ in range(9_999):
        share.add(False)
    assert share.recent_percent == share.percent == 0.01
    share.add(False)
    assert share.recent_percent == 0.0 and share.flagged == 1


def test_nothing_is_judged_before_a_window_is_full() -> None:
    scores = SignalScores()
    assert all(math.isnan(scores.update(100.0 * (step % 2))) for step in range(128))
    assert scores.update(math.nan) == math.inf
    assert scores.both_sides.judged == 0


def test_metrics_are_numbers_and_few(calm, observed) -> None:
    monitor = Monitor()
    for seen in observed(calm(200)):
        metrics = monitor.update(seen).metrics
    assert len(metrics) <= 20
    assert all(type(value) in (int, float) and not math.isnan(value) for value in metrics.values())
