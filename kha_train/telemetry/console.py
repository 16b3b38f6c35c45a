"""What rank 0 prints during training: a progress bar on a terminal; elsewhere one line per step, or at intervals."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from kha_train.config.schema import RunConfig
from kha_train.literal import visible
from kha_train.output import HarmlessStream
from kha_train.record import Redactor
from kha_train.telemetry.format import MAX_WIDTH, step_line
from kha_train.telemetry.meters import MovingAverage, TimeLeft
from kha_train.telemetry.terminal import LiteralConsole, literal

TIMED_WIDTH = 60
"""A narrower terminal needs the width of the time for the step."""
MEASURED = ("validation/", "evaluation/")
"""What the entries of validations and tasks begin with."""
SECONDS_BETWEEN_LINES = 10.0
"""In mode `auto` without a terminal, lines are at least this many seconds apart."""


class Console:
    """The console of a run, in the mode of `telemetry.console`; silent on ranks other than 0.

    `lines` prints every step, `progress` a bar with the latest line under it, `auto` the bar on a terminal and
    otherwise a line every ten seconds (first, last, skipped and validation steps always), `quiet` only messages. Every
    line except the closing block begins with the local time: in a log with the date, on a terminal without it, and on a
    terminal narrower than `TIMED_WIDTH` not at all.
    """

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        *,
        rank: int = 0,
        start_step: int = 0,
        memory_total_gib: float | None = None,
        loss_average: MovingAverage | None = None,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start_step` is the number of steps finished before, `loss_average` the average to continue; `file` defaults
        to standard output.
        """
        self.total_steps = total_steps
        self._clean = Redactor.from_environment().text
        self._rich = LiteralConsole(file=HarmlessStream(file or sys.stdout), quiet=rank != 0)
        mode = config.telemetry.console
        self.mode = ("progress" if self._rich.is_terminal else "sparse") if mode == "auto" else mode
        self._clock = clock
        self._last_shown = float("-inf")
        self._time_left, self._sizes = TimeLeft(clock()), config.data.batch_sizes
        self._loss = loss_average or MovingAverage()
        self._memory_total_gib = memory_total_gib
        self._checkpoint: int | None = None
        self._bar: _Bar | None = None
        if self.mode == "progress" and rank == 0:
            self._bar = _Bar(self._rich, visible(self._clean(config.run.name)), start_step, total_steps)

    def step(self, line: dict[str, Any]) -> None:
        """Shows a metrics line, and what validations and tasks found where it has any of that."""
        now = self._clock()
        loss_average = self._loss.update(line.get("train/loss", float("nan")))
        text = step_line(
            line,
            self.total_steps,
            loss_average=loss_average,
            seconds_left=self._time_left.after_step(
                now, self._sizes.of(line["step"]), self._sizes.total(line["step"] + 1, self.total_steps)
            ),
            memory_total_gib=self._memory_total_gib,
            checkpoint_step=self._checkpoint,
            width=self._width,
        )
        if self._bar is not None:
            self._bar.show(line["step"], text)
        elif self.mode == "lines" or (self.mode == "sparse" and self._is_due(line, now)):
            self._last_shown = now
            self.message(text)
        for text in measured_lines(line) if self.mode != "quiet" else ():
            self.message(text)

    def message(self, text: str) -> None:
        """Prints a line of text, above the bar if there is one."""
        self._print(f"{self._time()}{text}")

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._rich.print(literal(f"{self._time()}warning: {self._clean(text)}", "yellow"), soft_wrap=True)

    def checkpoint_saved(self, step: int) -> None:
        """Stores the newest checkpoint for the following lines."""
        self._checkpoint = step

    def final(self, rows: Sequence[tuple[str, str]], next_command: str = "") -> None:
        """The closing block: names and values, one per line, then the next command to type."""
        self.close()
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._print(f"{name:<{width}}  {value}")
        if next_command:
            self._print(f"next: {next_command}")

    def close(self) -> None:
        """Removes the bar from the terminal; closing twice is harmless."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _print(self, text: str) -> None:
        self._rich.print(self._clean(text), soft_wrap=True)

    @property
    def _is_fitted(self) -> bool:
        """Whether lines must fit a terminal, or the width given by COLUMNS."""
        return self._rich.is_terminal or "COLUMNS" in os.environ

    @property
    def _width(self) -> int:
        """Width of a step line without its time, which is missing below a bar."""
        if not self._is_fitted:
            return MAX_WIDTH
        return min(self._rich.width, MAX_WIDTH) - (0 if self._bar else len(self._time()))

    def _time(self) -> str:
        """The time at the beginning of a line."""
        if not self._is_fitted:
            return time.strftime("%Y-%m-%d %H:%M:%S ")
        return time.strftime("%H:%M:%S ") if self._rich.width >= TIMED_WIDTH else ""

    def _is_due(self, line: dict[str, Any], now: float) -> bool:
        matters = line["step"] == self.total_steps or bool(line.get("train/skipped") or measured_lines(line))
        return matters or now - self._last_shown >= SECONDS_BETWEEN_LINES


def measured_lines(line: dict[str, Any]) -> list[str]:
    """What validations and tasks found in the step of a metrics line, in words: a line for all validation sets, and one
    for each task."""
    validation: list[str] = []
    tasks: dict[str, list[str]] = {}
    for key in (key for key in line if key.startswith(MEASURED)):
        kind, *named, figure = key.split("/")
        if kind == "validation":
            validation.append(" ".join([*named, _figure(figure, line[key])]))
        else:
            tasks.setdefault("/".join(named), []).append(_figure(figure, line[key]))
    when = f"at step {line['step']}"
    shown = [f"validation {when} | {' | '.join(validation)}"] if validation else []
    return [*shown, *(f"{task} {when} | {' | '.join(figures)}" for task, figures in tasks.items())]


def _figure(name: str, value: float) -> str:
    return f"{value:.4f} bits per byte" if name == "bits_per_byte" else f"{name} {value:.4f}"


class _Bar:
    """A progress bar with a line of text below it, shown at once."""

    def __init__(self, console: LiteralConsole, name: str, start_step: int, total_steps: int) -> None:
        name_column, bar = TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)
        columns = (name_column, bar, TaskProgressColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=console, expand=True)
        self._task = self._progress.add_task(name, total=total_steps, completed=start_step)
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        self._live.start()

    def show(self, step: int, text: str) -> None:
        """Advance to `step`, with `text` below."""
        self._progress.update(self._task, completed=step)
        self._live.update(Group(self._progress, Text(text, overflow="ellipsis", no_wrap=True)))

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._live.stop()
