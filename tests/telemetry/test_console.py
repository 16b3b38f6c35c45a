"""The console agrees with the record, fits the available width, and prints only on rank 0."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kha_train.config.batch_sizes import BatchSizes
from kha_train.telemetry import Console, MovingAverage
from kha_train.telemetry.format import MAX_WIDTH, duration, scaled, scientific, step_line

LINE = {
    "step": 1200,
    "tokens": 9_830_400,
    "train/loss": 3.4121,
    "train/grad_norm": 0.412,
    "train/lr": 2.9e-4,
    "train/tokens_per_second": 182_345.0,
    "train/mfu": 0.381,
    "memory/peak_gib": 61.2,
    "moe/maxvio": 0.07,
}


TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(file: io.StringIO) -> list[str]:
    """The lines of a log without their times, which every one has."""
    lines = file.getvalue().splitlines()
    assert all(TIME.match(line) for line in lines), lines
    return [TIME.sub("", line, count=1) for line in lines]


ONE_SIZE = BatchSizes(8)


def console(
    mode: str, file: io.StringIO, total: int = 100, batch_sizes: BatchSizes = ONE_SIZE, **options: Any
) -> Console:
    data = SimpleNamespace(batch_sizes=batch_sizes)
    config = SimpleNamespace(run=SimpleNamespace(name="tiny"), telemetry=SimpleNamespace(console=mode), data=data)
    return Console(config, total, file=file, **options)


def test_the_step_line_reads_as_documented() -> None:
    text = step_line(LINE, 61035, loss_average=3.45, seconds_left=273_120, memory_total_gib=80.0, checkpoint_step=1000)
    assert text == (
        "step 1200/61035 1.97% | loss 3.412 | ema 3.450 | gnorm 0.41 | lr 2.9e-4 | 182k tok/s | MFU 38.1% | "
        "ETA 3d 03:52"
    )
    assert step_line({"step": 1, "train/loss": math.nan, "train/skipped": 1}, 10) == (
        "step 1/10 10.00% | loss nan | SKIPPED | ETA ?"
    )


NUMBER = st.one_of(st.floats(), st.floats(0, 1e20))


@given(st.dictionaries(st.sampled_from(sorted(LINE.keys() - {"step"})), NUMBER), st.integers(0, 10**9), NUMBER)
def test_no_step_line_is_longer_than_120_characters(values: dict, step: int, seconds: float) -> None:
    line = {"step": step, **values}
    text = step_line(line, 10**9, loss_average=1.0, seconds_left=seconds, memory_total_gib=80.0, checkpoint_step=step)
    assert len(text) <= MAX_WIDTH
    assert text.startswith(f"step {step}/")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (812, "812"), (18_234, "18.2k"), (182_345, "182k"), (999_600, "1000k"), (1_310_000, "1.31M")],
)
def test_numbers_are_scaled(number: float, text: str) -> None:
    assert scaled(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45.4, "0:45"),
        (725, "12:05"),
        (15_153, "4:12:33"),
        (273_120, "3d 03:52"),
        (8.64e80, ">9999d"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_exponents_are_short() -> None:
    assert [scientific(2.9e-4), scientific(1.0), scientific(0.0)] == ["2.9e-4", "1.0e0", "0.0e0"]


def test_lines_mode_prints_one_line_a_step_and_the_validation() -> None:
    file = io.StringIO()
    shown = console("lines", file)
    for step in (1, 2, 3):
        shown.step({**LINE, "step": step})
    shown.step({**LINE, "step": 4, "validation/loss": 3.5, "validation/bits_per_byte": 1.25})
    lines = said(file)
    assert [line.split()[1] for line in lines[:4]] == ["1/100", "2/100", "3/100", "4/100"]
    assert lines[4:] == ["validation at step 4 | loss 3.5000 | 1.2500 bits per byte"]


def test_away_from_a_terminal_auto_prints_every_so_often_and_never_misses_what_matters() -> None:
    file = io.StringIO()
    now = iter(range(1000))
    shown = console("auto", file, clock=lambda: float(next(now)))
    for step in range(1, 101):
        shown.step({**LINE, "step": step, "train/skipped": int(step == 37)})
    steps = [int(line.split()[1].split("/")[0]) for line in said(file)]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert 37 in steps
    assert 10 <= len(steps) <= 13


def test_the_time_left_is_steps_left_times_the_wall_time_of_a_step() -> None:
    file = io.StringIO()
    now = iter(range(0, 1000, 2))
    shown = console("lines", file, clock=lambda: float(next(now)))
    for step in range(1, 41):
        shown.step({"step": step})
    assert file.getvalue().splitlines()[-1].endswith("ETA 2:00")


def test_the_time_left_counts_the_rows_of_a_batch_that_grows() -> None:
    file, now = io.StringIO(), [0.0]
    sizes = BatchSizes(8, ((21, 16), (61, 32)))
    shown = console("lines", file, clock=lambda: now[0], batch_sizes=sizes)
    for step in range(1, 41):
        now[0] += sizes.of(step) / 4
        shown.step({"step": step})
    # A quarter of a second a row: 20 steps of 16 rows and 40 of 32 are left.
    assert file.getvalue().splitlines()[-1].endswith("ETA 6:40")


def test_no_time_left_is_told_before_the_steps_are_steady_and_the_first_two_never_count() -> None:
    """The first step waits for a compiler, the second for its probe."""
    file, now = io.StringIO(), [0.0]
    shown = console("lines", file, clock=lambda: now[0], start_step=60)
    for step, seconds in enumerate((300.0, 90.0, 2.0, 2.0, 2.0, 2.0), start=61):
        now[0] += seconds
        shown.step({"step": step})
    told = [line.rpartition("ETA ")[2] for line in said(file)]
    assert told == ["?", "?", "?", "?", "1:10", "1:08"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_cuts_nothing_off_and_always_shows_step_loss_and_time_left(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for mode in ("lines", "progress"):
        file = Terminal()
        now = iter(range(0, 10**7, 4400))
        with console(mode, file, 61035, clock=lambda: float(next(now))) as shown:  # noqa: B023
            for step in range(1200, 1206):
                shown.step({**LINE, "step": step})
        lines = [line for line in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[a-zA-Z]", file.getvalue()) if "loss" in line]
        assert lines and all(len(line) <= width for line in lines), lines
        assert "loss 3.412" in lines[-1] and "ETA 3046d" in lines[-1] and "\u2026" not in lines[-1]
        assert "step 1205" in lines[-1] and ("step 1205/61035" in lines[-1]) == (width > 40)
        assert ("tok/s" in lines[-1]) == (width > 40) and ("MFU" in lines[-1]) == (width > 80)
        assert bool(re.match(r"\d\d:\d\d:\d\d ", lines[-1])) == (mode == "lines" and width > 40)


@given(st.sampled_from((1, 61035, 10**9)), st.floats(0, 1e9), st.integers(30, 130))
def test_a_part_of_the_step_line_is_whole_or_not_there(total: int, seconds: float, width: int) -> None:
    whole = step_line(LINE, total, loss_average=3.0, seconds_left=seconds, checkpoint_step=1000, width=10**4)
    text = step_line(LINE, total, loss_average=3.0, seconds_left=seconds, checkpoint_step=1000, width=width)
    head, *parts = text.split(" | ")
    assert len(text) <= width and whole.startswith(head) and set(parts) <= set(whole.split(" | "))


def test_an_average_goes_on_from_its_state_and_begins_anew_without_one() -> None:
    first, second = MovingAverage(), MovingAverage()
    for value in (3.0, math.nan, 2.0):
        first.update(value)
    second.restore(first.state())
    assert second.update(1.0) == first.update(1.0)
    second.restore(None)
    assert second.update(7.0) == 7.0


def test_on_a_terminal_auto_shows_a_bar_and_the_latest_line() -> None:
    file = Terminal()
    with console("auto", file, start_step=40) as shown:
        assert shown.mode == "progress"
        shown.step({**LINE, "step": 50})
        shown.message("hello")
    text = file.getvalue()
    assert "50/100" in text
    assert "loss 3.412" in text
    assert "hello" in text


@pytest.mark.parametrize("mode", ["auto", "lines", "progress", "quiet"])
def test_other_ranks_print_nothing(mode: str) -> None:
    file = Terminal()
    with console(mode, file, rank=1) as shown:
        shown.step({**LINE, "validation/loss": 1.0})
        shown.message("x")
        shown.warn("x")
        shown.final([("tokens", "1")], "kha compare")
    assert file.getvalue() == ""


def test_quiet_prints_messages_but_no_steps() -> None:
    file = io.StringIO()
    shown = console("quiet", file)
    shown.step({**LINE, "validation/loss": 1.0})
    shown.final([("tokens", "1"), ("wall time", "0:05")], "kha compare runs/a")
    assert file.getvalue().splitlines() == ["tokens     1", "wall time  0:05", "next: kha compare runs/a"]


def test_brackets_in_messages_are_printed_as_they_are() -> None:
    file = io.StringIO()
    shown = console("lines", file)
    shown.message("found [bold]x[/bold] in " + "y" * 200)
    assert said(file) == ["found [bold]x[/bold] in " + "y" * 200]
