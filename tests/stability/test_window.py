"""Windows and baselines against the same figures computed from scratch."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.stability.baseline import Baseline
from kha_train.stability.window import Window, usable

VALUES = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60)


@settings(deadline=None)
@given(VALUES, st.integers(1, 20))
def test_mean_and_deviation_are_those_of_the_last_values(values: list[float], size: int) -> None:
    window = Window(size)
    for number, value in enumerate(values, start=1):
        window.push(value)
        kept = values[max(0, number - size) : number]
        assert window.values == kept
        assert window.mean == pytest.approx(statistics.fmean(kept), rel=1e-12, abs=1e-18)
        assert window.deviation == pytest.approx(statistics.pstdev(kept), rel=1e-9, abs=1e-15)


def test_a_huge_value_is_forgotten_completely() -> None:
    calm = [1.0 + 0.1 * (step % 3) for step in range(8)]
    disturbed = Window(4, [*calm, 3e38, *calm])
    assert disturbed.deviation == Window(4, calm).deviation
    assert disturbed.mean == Window(4, calm).mean


def test_values_that_say_nothing_are_refused() -> None:
    assert [usable(value) for value in (math.nan, math.inf, -math.inf, 1e200, 1e38, 0.0)] == [False] * 4 + [True] * 2


@settings(deadline=None)
@given(VALUES, st.integers(1, 20))
def test_median_and_its_deviation_are_those_of_the_last_values(values: list[float], size: int) -> None:
    baseline = Baseline(size)
    for number, value in enumerate(values, start=1):
        baseline.push(value)
        kept = values[max(0, number - size) : number]
        median = statistics.median(kept)
        assert baseline.median == median
        expected = statistics.median(abs(value - median) for value in kept)
        assert baseline.median_deviation == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert baseline.spread == max(1.4826 * baseline.median_deviation, baseline.deviation)
