"""The rows of every step: arithmetic against counting step by step, and schedules that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kha_train.config.batch_sizes import BatchSizes
from kha_train.config.compose import compose
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError
from kha_train.estimate.plan import make_plan

STEPS = 60
schedules = st.builds(
    lambda first, changes: BatchSizes(first, tuple(sorted(changes.items()))),
    st.integers(1, 9),
    st.dictionaries(st.integers(2, 40), st.integers(1, 9), max_size=4),
)


def counted(sizes: BatchSizes) -> list[int]:
    """The rows of step 1, 2, ..., found by walking through the steps."""
    rows, found, changes = sizes.rows, [], dict(sizes.changes)
    for step in range(1, STEPS + 1):
        rows = changes.get(step, rows)
        found.append(rows)
    return found


@given(schedules, st.integers(1, STEPS), st.integers(0, STEPS))
def test_sizes_and_sums_are_those_of_counting_step_by_step(sizes: BatchSizes, first: int, last: int) -> None:
    rows = counted(sizes)
    assert [sizes.of(step) for step in range(1, STEPS + 1)] == rows
    assert sizes.total(first, last) == sum(rows[first - 1 : last])
    assert sizes.largest == max(sizes.rows, *(size for _, size in sizes.changes), 1)
    stretch = sizes.stretch_of(first)
    assert stretch.first <= first <= stretch.last
    assert {rows[step - 1] for step in range(stretch.first, int(min(stretch.last, STEPS)) + 1)} == {stretch.rows}


@given(schedules, st.integers(1, 400))
def test_the_steps_for_so_many_rows_come_nearest_to_them(sizes: BatchSizes, wanted: int) -> None:
    steps = sizes.steps_for(wanted)
    apart = abs(sizes.total(1, steps) - wanted)
    assert steps >= 1
    assert apart <= abs(sizes.total(1, steps + 1) - wanted)
    assert steps == 1 or apart <= abs(sizes.total(1, steps - 1) - wanted)


def test_a_saved_configuration_without_a_schedule_has_one_size() -> None:
    assert BatchSizes.of_saved({"data.global_batch_size": 4}) == BatchSizes(4)
    saved = {"data.global_batch_size": 4, "data.batch_schedule": [{"start_step": 3, "global_batch_size": 8}]}
    assert BatchSizes.of_saved(saved) == BatchSizes(4, ((3, 8),))


def test_each_size_must_divide_and_the_error_offers_schedules_that_do() -> None:
    changes = "[{start_step: 3, global_batch_size: 16}, {start_step: 9, global_batch_size: 18}]"
    config = compose(["data.global_batch_size=8", "engine.micro_batch_size=2", f"data.batch_schedule={changes}"])
    validate_batch(config, 1)
    with pytest.raises(ConfigError) as caught:
        validate_batch(config, 4)
    error = caught.value
    assert (error.field, error.value) == ("data.batch_schedule[1].global_batch_size", 18)
    assert error.allowed == "multiples of engine.micro_batch_size x ranks = 8"
    assert [fix.typed.count("global_batch_size: 16") for fix in error.typed_fixes] == [2, 1]
    assert make_plan(config).batch_problem is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ("[{start_step: 1, global_batch_size: 16}]", "data.batch_schedule[0].start_step"),
        ("[{start_step: 5, global_batch_size: 0}]", "data.batch_schedule[0].global_batch_size"),
        (
            "[{start_step: 5, global_batch_size: 16}, {start_step: 5, global_batch_size: 8}]",
            "data.batch_schedule[1].start_step",
        ),
    ],
)
def test_a_schedule_that_is_none_is_refused(changes: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"data.batch_schedule={changes}"])
    assert caught.value.field == field
