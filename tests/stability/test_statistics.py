"""Rates, intervals, halves, shared events, tail gaps."""

from __future__ import annotations

import math

import pytest

from kha_train.stability.events import SpikeEvent
from kha_train.stability.statistics import poisson_interval, rate, shared_events, summarise, tail_gap


def event(
    start: int,
    end: int | None = None,
    recovered: bool = True,
    height: float = 1.0,
    samples: tuple[int, int] = (-1, -1),
) -> SpikeEvent:
    """An event of given place and height, of area 2."""
    made = SpikeEvent(start, end or start, 0, 1e-3, *samples, 3.0, 0.1, 1.0, height=height, area=2.0, open=False)
    made.recovered = recovered
    return made


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(0, 0.0, 3.6889), (1, 0.0253, 5.5716), (5, 1.6235, 11.6683), (20, 12.2165, 30.8884), (100, 81.3640, 121.6268)],
)
def test_the_interval_is_garwoods(count: int, low: float, high: float) -> None:
    """Against published tables (half the chi-square quantiles)."""
    assert poisson_interval(count) == pytest.approx((low, high), abs=6e-5)


def test_rates_are_per_exposure_and_unknown_without_one() -> None:
    assert rate(5, 10.0)["value"] == 0.5
    assert all(math.isnan(value) for value in rate(5, 0.0).values())


def test_only_narrow_and_wide_events_are_spikes_and_sizes_cover_every_class() -> None:
    last = event(950, 969, recovered=False, height=5.0)
    last.open = True
    events = [event(10), event(600, 620, height=3.0), event(700, 800, recovered=False, height=9.0), last]
    summary = summarise(events, first_step=1, last_step=1000, tokens=2_000_000_000)
    assert (summary["spikes"], summary["events_total"], summary["diverged"]) == (2, 4, True)
    assert [summary[f"{kind}_total"] for kind in ("narrow", "wide", "unrecovered", "open")] == [1, 1, 1, 1]
    assert (summary["first_half"], summary["second_half"]) == (1, 1)
    # Widths 1 + 21 + 101 + 20, areas of 2 each.
    assert summary["steps_in_spike_frac"] == 143 / 1000
    assert (summary["area_total"], summary["max_height"]) == (8.0, 9.0)
    assert summary["by_class"] == {
        "narrow": {"events": 1, "steps": 1, "area": 2.0, "max_height": 1.0},
        "wide": {"events": 1, "steps": 21, "area": 2.0, "max_height": 3.0},
        "unrecovered": {"events": 1, "steps": 101, "area": 2.0, "max_height": 9.0},
        "open": {"events": 1, "steps": 20, "area": 2.0, "max_height": 5.0},
    }
    assert summary["rates"]["per_1k_steps"]["value"] == 2.0
    assert summary["rates"]["wide_per_1k_steps"]["value"] == 1.0
    assert summary["rates"]["per_billion_tokens"]["value"] == 1.0


def test_a_run_without_an_open_event_has_diverged_only_when_told_so() -> None:
    events = [event(700, 800, recovered=False)]
    for told in (False, True):
        assert summarise(events, first_step=1, last_step=1000, tokens=0, diverged=told)["diverged"] is told


def test_events_at_the_same_place_are_shared_and_others_private() -> None:
    one = [event(100), event(500, 520), event(900)]
    other = [event(102), event(530)]
    assert shared_events([one, other, []]) == [[True, False, False], [True, False], []]


def test_undone_steps_join_the_exposure_with_their_tokens() -> None:
    events = [event(100_010), event(100_090)]
    summary = summarise(events, first_step=100_001, last_step=100_100, tokens=1000, undone_steps=[100_020] * 25)
    assert (summary["steps"], summary["tokens"]) == (125, 1250)
    rates = {name: value["value"] for name, value in summary["rates"].items()}
    assert rates["per_1k_steps"] == pytest.approx(16) and rates["per_billion_tokens"] == pytest.approx(2e9 / 1250)
    assert rates["first_half_per_1k_steps"] == pytest.approx(1000 / 75)
    assert rates["second_half_per_1k_steps"] == pytest.approx(1000 / 50)


def test_events_are_matched_by_samples_where_both_runs_know_them() -> None:
    one, other = [event(100, samples=(800, 807))], [event(140, samples=(816, 823))]
    assert shared_events([one, other]) == [[True], [True]]
    assert shared_events([one, [event(100, samples=(9000, 9007))]]) == [[False], [False]]
    assert shared_events([one, [event(101)]]) == [[True], [True]]


def test_a_curve_has_no_tail_gap_to_itself() -> None:
    curve = [(100.0 * step, 5.0 - 0.01 * step + 0.3 * (step % 3)) for step in range(1, 101)]
    assert tail_gap(curve, curve) == {"gap": 0.0, "points": 51}


def test_the_tail_gap_of_curves_that_begin_late_is_over_the_half_that_they_have() -> None:
    """Steps of 1,000 tokens from 100,000 on: a gap of 1 in the first half, of 2 in the second."""
    tokens = [1000.0 * step for step in range(101, 151)]
    reference = [(at, 3.0) for at in tokens]
    curve = [(at, 4.0 if at <= 125_000 else 5.0) for at in tokens]
    gap = tail_gap(curve, reference)
    assert gap["points"] == 26 and gap["gap"] == pytest.approx((1 + 25 * 2) / 26)


def test_the_tail_gap_is_at_equal_tokens_over_the_second_half() -> None:
    reference = [(100.0 * step, 5.0 - 0.01 * step) for step in range(1, 101)]
    curve = [(250.0 * step, 5.0 - 0.01 * 2.5 * step + (0.3 if step <= 19 else 0.1)) for step in range(1, 41)]
    gap = tail_gap(curve, reference)
    assert gap["points"] == 21
    assert gap["gap"] == pytest.approx(0.1)
    assert math.isnan(tail_gap([], reference)["gap"])
    assert tail_gap([*curve[:30], (7750.0, math.nan), *curve[31:]], reference)["points"] == 20
