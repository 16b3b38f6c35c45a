"""The baseline of the event detector follows the trend of a curve."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.bench.spikes import early_curve
from kha_train.checkpoint.trainer_state import decode_state
from kha_train.stability.events import EventDetector, Observation
from kha_train.stability.monitor import Monitor
from kha_train.stability.trend import Trend

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs" / "runs"


def test_a_line_through_the_medians_of_the_halves_is_carried_on() -> None:
    rising = Trend([3.0 + 0.01 * number for number in range(128)])
    assert rising.expected == pytest.approx(3.0 + 0.01 * 128)
    # A fall ends where its last values are: the median of numbers 120 to 127 is at 123.5.
    falling = Trend([5.0 - 0.01 * number for number in range(128)])
    assert falling.expected == pytest.approx(5.0 - 0.01 * 123.5)
    assert rising.scale == falling.scale == 0.001, "nothing lies off its line"


def test_a_few_wild_values_do_not_bend_the_line() -> None:
    values = [3.0 + 0.01 * number for number in range(128)]
    for number in (5, 6, 7, 70, 71, 72):
        values[number] = 50.0
    # Three values above each median move it by one and a half places at most.
    assert Trend(values).expected == pytest.approx(3.0 + 0.01 * 128, abs=0.04)


def test_a_curve_that_stops_falling_is_expected_at_its_last_values() -> None:
    trend = Trend([10.0 - 0.05 * number for number in range(100)] + [5.0] * 28)
    newer = statistics.median([10.0 - 0.05 * number for number in range(64, 100)] + [5.0] * 28)
    older = statistics.median([10.0 - 0.05 * number for number in range(64)])
    assert newer + (newer - older) / 64 * 32.5 < 4.6, "where the line is"
    assert trend.expected == 5.0


def test_the_scale_is_that_of_the_judged_values_but_the_last_eight() -> None:
    trend = Trend([3.0] * 64)
    for deviation in range(1, 129 + 8):
        trend.push(3.0, deviation / 10)
    assert trend.deviations == [number / 10 for number in range(1, 129)]
    assert trend.waiting == [number / 10 for number in range(129, 137)]
    # The standard deviation of 1 .. 128 is sqrt((128^2 - 1) / 12); their MAD is 32.
    assert trend.scale == pytest.approx(max(1.4826 * 3.2, 0.1 * ((128**2 - 1) / 12) ** 0.5))
    trend.discard_waiting()
    assert trend.waiting == [] and len(trend.deviations) == 128


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-9.9e99, 9.9e99, allow_subnormal=False), min_size=1, max_size=140))
def test_any_usable_values_are_judged_and_the_state_is_bounded_and_whole(values: list[float]) -> None:
    detector = EventDetector()
    for step, value in enumerate(values * 3):
        straight = EventDetector.restore(detector.state()).update(Observation(step, value))
        assert detector.update(Observation(step, value)) == straight
    state = detector.state()
    assert len(state["baseline"]) <= 128 and len(state["deviations"]) <= 128 and len(state["waiting"]) <= 8


def test_an_event_opens_at_z_8_and_not_below() -> None:
    # A constant curve has the floor of 0.001 as its scale.
    for rise, opened in ((0.0079, False), (0.0081, True)):
        detector = EventDetector()
        for step in range(100):
            detector.update(Observation(step, 3.0))
        reading = detector.update(Observation(100, 3.0 + rise))
        assert reading.opened is opened
        assert reading.z == pytest.approx(1000 * rise)


def noisy(source: random.Random, level: float) -> float:
    return source.gauss(level, 0.03)


@pytest.mark.parametrize("slope", [0.0, -0.01])
@pytest.mark.parametrize("steps", [5, 20, 40])
def test_a_slow_rise_does_not_widen_its_own_scale(steps: int, slope: float) -> None:
    for seed in range(5):
        source, detector, opened = random.Random(seed), EventDetector(), []
        for step in range(400):
            rise = 2.0 * min(1.0, max(0.0, (step - 300) / steps))
            reading = detector.update(Observation(step, noisy(source, 8.0 + slope * min(step, 300) + rise)))
            opened += [step] if reading.opened else []
        assert len(opened) == 1 and 300 < opened[0] <= 300 + steps


@pytest.mark.parametrize("plateau", [10, 100])
@pytest.mark.parametrize("fall", [5, 50, 200])
def test_a_plateau_a_steep_fall_and_its_end_open_nothing(plateau: int, fall: int) -> None:
    """The beginning of a run with a warm-up."""
    for seed in range(5):
        source, detector = random.Random(seed), EventDetector()
        for step in range(700):
            level = 10.8 - 3.8 * min(1.0, max(0.0, (step - plateau) / fall))
            assert not detector.update(Observation(step, noisy(source, level))).opened


def test_a_small_spike_is_seen_while_the_loss_falls_fast() -> None:
    """From 8.7 by 0.011 a step; the fall inside the window is 1.4 nats, four times the spike."""
    source, detector = random.Random(3), EventDetector()
    for step in range(200):
        detector.update(Observation(step, noisy(source, 8.7 - 0.011 * step)))
    assert not detector.update(Observation(200, 8.7 - 0.011 * 200)).opened
    assert detector.update(Observation(201, 8.7 - 0.011 * 201 + 0.5)).opened


def older_state(state: dict) -> dict:
    """What a checkpoint held before the trend was followed."""
    return {key: value for key, value in state.items() if key not in ("deviations", "waiting")}


@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_from_before_the_trend_was_followed_goes_on(inside: bool) -> None:
    source, monitor = random.Random(1), Monitor()
    for step in range(300):
        monitor.update(Observation(step, noisy(source, 8.7 - 0.011 * step)))
    if inside:
        monitor.update(Observation(300, 8.7))
    state = monitor.state()
    restored = Monitor.restore({**state, "events": older_state(state["events"])})
    # Its scale is that of the baseline about its own line, the noise of 0.03, and not that of the fall, 0.4.
    assert restored.events.baseline.scale == pytest.approx(0.03, rel=0.25)
    assert (restored.events.event is not None) is inside
    closed = [restored.update(Observation(301 + n, noisy(source, 8.7 - 0.011 * (301 + n)))).closed for n in range(60)]
    assert sum(event is not None for event in closed) == inside
    assert restored.update(Observation(361, 8.7 - 0.011 * 361 + 0.5)).opened


@pytest.mark.parametrize("run", ["gqa", "kha_mlp"])
def test_the_detector_of_an_older_release_goes_on(run: str) -> None:
    (file,) = (OLD / run / "checkpoints").glob("*/trainer.json")
    state = decode_state(file.read_bytes())["stability"]["monitor"]
    assert "deviations" not in state["events"] and len(state["events"]["baseline"]) == 72
    monitor = Monitor.restore(state)
    baseline = monitor.events.baseline
    assert baseline.values == state["events"]["baseline"] and len(baseline.deviations) == 72
    level, scale = baseline.expected, baseline.scale
    assert monitor.update(Observation(73, level + 7.9 * scale)).opened is False
    assert Monitor.restore(state).update(Observation(73, level + 8.1 * scale)).opened is True


@pytest.mark.parametrize("noise", ["normal", "mixed"])
def test_an_early_curve_is_judged_alike_with_resumes_anywhere(noise: str) -> None:
    stops, straight, broken, inside = random.Random(noise), Monitor(), Monitor(), 0
    for step, loss in enumerate(early_curve(17, noise).losses):
        is_open = broken.events.event is not None
        if is_open or stops.random() < 0.03:
            inside += is_open
            broken = Monitor.restore(broken.state())
        assert repr(straight.update(Observation(step, loss))) == repr(broken.update(Observation(step, loss)))
    assert straight.state() == broken.state() and inside >= 10
