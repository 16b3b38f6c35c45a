"""What is an event and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from kha_train.stability.events import EventDetector, SpikeEvent


@pytest.fixture
def events_of(observed) -> Callable[[list[float]], list[SpikeEvent]]:
    """The events of a curve, one that is open at its end included."""

    def run(losses: list[float]) -> list[SpikeEvent]:
        detector, found = EventDetector(), []
        for seen in observed(losses):
            reading = detector.update(seen)
            found += [reading.closed] if reading.closed else []
        return found + ([detector.event] if detector.event else [])

    return run


def test_a_spike_has_its_start_width_height_and_area(events_of, calm) -> None:
    losses = calm(400)
    for offset, height in enumerate((2.0, 1.5, 1.0, 0.5)):
        losses[200 + offset] = 3.0 + height
    (event,) = events_of(losses)
    assert (event.start_step, event.width, event.kind, event.recovered) == (201, 4, "narrow", True)
    assert event.height == pytest.approx(2.0, abs=0.02)
    assert event.area == pytest.approx(5.0, abs=0.05)
    assert (event.tokens, event.samples_first, event.lr) == (201_000, 1600, 1e-3)
    assert event.to_dict()["class"] == "narrow"
    assert event.to_dict()["rel_height"] == pytest.approx(2 / 3, abs=0.01)


def test_a_spike_of_more_than_ten_steps_is_wide(events_of, calm) -> None:
    losses = calm(400)
    for offset in range(11):
        losses[200 + offset] += 1.0
    (event,) = events_of(losses)
    assert (event.width, event.kind) == (11, "wide")


def test_two_calm_steps_inside_a_spike_do_not_end_it_and_three_do(events_of, calm) -> None:
    for pause, count in ((2, 1), (3, 2)):
        losses = calm(400)
        losses[200] += 2.0
        losses[201 + pause] += 2.0
        assert len(events_of(losses)) == count


def test_a_spike_does_not_hide_the_next_one(events_of, calm) -> None:
    losses = calm(600)
    for offset in range(60):
        losses[200 + offset] += 6.0
    for place in (270, 310, 400):
        losses[place] += 0.3
    assert [event.start_step for event in events_of(losses)] == [201, 271, 311, 401]


def test_a_level_shift_is_one_unrecovered_event_and_spikes_after_it_are_found_again(events_of, calm) -> None:
    losses = calm(300) + calm(3000, seed=1, level=4.0)
    losses[2900] += 1.0
    shift, spike = events_of(losses)
    assert (shift.start_step, shift.width, shift.kind, shift.recovered) == (301, 2000, "unrecovered", False)
    assert (spike.start_step, spike.kind) == (2901, "narrow")


def test_slow_drifts_and_a_falling_loss_open_nothing(events_of, calm) -> None:
    rising = [value + 0.002 * step for step, value in enumerate(calm(3000))]
    falling = [value + 8.0 * (1 + step / 20) ** -0.5 for step, value in enumerate(calm(3000))]
    assert events_of(rising) == []
    assert events_of(falling) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_event_at_once_even_as_the_first(events_of, calm, value: float) -> None:
    for place in (0, 5, 300):
        losses = calm(400)
        losses[place] = value
        (event,) = events_of(losses)
        assert (event.start_step, event.width, event.nonfinite_steps) == (place + 1, 1, 1)
        assert event.recovered and event.height == 0.0


def test_an_infinite_norm_alone_is_an_event(calm, observed) -> None:
    detector = EventDetector()
    norms = [1.0] * 200
    norms[150] = math.inf
    opened = [seen.step for seen in observed(calm(200), norms) if detector.update(seen, 2.0).opened]
    assert opened == [151]


def test_an_event_open_at_the_end_is_called_that(events_of, calm) -> None:
    losses = calm(300)
    losses[-2] += 3.0
    (event,) = events_of(losses)
    assert event.open and not event.recovered
    assert event.kind == event.to_dict()["class"] == "open"


def test_a_planned_jump_is_no_event(calm, observed) -> None:
    detector, opened = EventDetector(), []
    for seen in observed(calm(300) + calm(300, seed=1, level=5.0)):
        if seen.step == 301:
            assert detector.rebase() is None
        opened += [seen.step] if detector.update(seen).opened else []
    assert opened == []
    losses = calm(300)
    losses[-1] += 3.0
    for seen in observed(losses):
        detector.update(seen)
    event = detector.rebase()
    assert event is not None and not event.open and event.kind == "unrecovered"
