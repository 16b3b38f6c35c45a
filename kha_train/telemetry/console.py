"""What rank 0 says while training: a progress bar on a terminal, one line a step or every so often elsewhere."""

from __future__ import annotations

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
from kha_train.telemetry.format import step_line
from kha_train.telemetry.meters import MovingAverage
from kha_train.telemetry.terminal import LiteralConsole, literal

SECONDS_BETWEEN_LINES = 10.0
"""In mode `auto` away from a terminal, a line is printed at most this often."""


class Console:
    """The console of a run, in the mode of `telemetry.console`; on other ranks than 0 it is silent.

    `lines` prints every step, `progress` a bar with the latest line under it, `auto` the bar on a terminal and
    otherwise a line every ten seconds (first, last, skipped and validation steps always), `quiet` messages only.
    """

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        *,
        rank: int = 0,
        start_step: int = 0,
        memory_total_gib: float | None = None,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start_step` is the number of steps finished before; `file` defaults to standard output."""
        self.total_steps = total_steps
        self._clean = Redactor.from_environment().text
        self._rich = LiteralConsole(file=HarmlessStream(file or sys.stdout), quiet=rank != 0)
        mode = config.telemetry.console
        self.mode = ("progress" if self._rich.is_terminal else "sparse") if mode == "auto" else mode
        self._clock = clock
        self._last_shown, self._last_step_at = float("-inf"), clock()
        self._seconds = MovingAverage(0.95)
        self._loss = MovingAverage()
        self._memory_total_gib = memory_total_gib
        self._checkpoint: int | None = None
        self._live: Live | None = None
        if self.mode == "progress" and rank == 0:
            self._start_bar(config.run.name, start_step)

    def step(self, line: dict[str, Any]) -> None:
        """Shows a metrics line, and the validation result when it has one."""
        now = self._clock()
        # The wall time between steps counts saving and validating too, which an ETA must.
        seconds = self._seconds.update(now - self._last_step_at)
        self._last_step_at = now
        loss_average = self._loss.update(line.get("train/loss", float("nan")))
        text = step_line(
            line,
            self.total_steps,
            loss_average=loss_average,
            seconds_left=seconds * (self.total_steps - line["step"]),
            memory_total_gib=self._memory_total_gib,
            checkpoint_step=self._checkpoint,
        )
        if self._live is not None:
            self._progress.update(self._task, completed=line["step"])
            self._live.update(Group(self._progress, Text(text, overflow="ellipsis", no_wrap=True)))
        elif self.mode == "lines" or (self.mode == "sparse" and self._is_due(line, now)):
            self._last_shown = now
            self.message(text)
        if "validation/loss" in line and self.mode != "quiet":
            self.message(validation_line(line))

    def message(self, text: str) -> None:
        """Prints a line of text, above the bar if there is one."""
        self._rich.print(self._clean(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a line that should be read."""
        self._rich.print(literal(f"warning: {self._clean(text)}", "yellow"), soft_wrap=True)

    def checkpoint_saved(self, step: int) -> None:
        """Remembers the newest checkpoint for the lines that follow."""
        self._checkpoint = step

    def final(self, rows: Sequence[tuple[str, str]], next_command: str = "") -> None:
        """The closing block: names and values, one a line, then the next command to type."""
        self.close()
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.message(f"{name:<{width}}  {value}")
        if next_command:
            self.message(f"next: {next_command}")

    def close(self) -> None:
        """Takes the bar off the terminal; closing twice is harmless."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_bar(self, name: str, start_step: int) -> None:
        name_column, bar = TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)
        columns = (name_column, bar, TaskProgressColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=self._rich, expand=True)
        self._task = self._progress.add_task(visible(self._clean(name)), total=self.total_steps, completed=start_step)
        self._live = Live(self._progress, console=self._rich, refresh_per_second=4)
        self._live.start()

    def _is_due(self, line: dict[str, Any], now: float) -> bool:
        matters = line["step"] == self.total_steps or "validation/loss" in line or bool(line.get("train/skipped"))
        return matters or now - self._last_shown >= SECONDS_BETWEEN_LINES


def validation_line(line: dict[str, Any]) -> str:
    """The validation result of a metrics line in words."""
    bits = line.get("validation/bits_per_byte")
    tail = "" if bits is None else f" | {bits:.4f} bits per byte"
    return f"validation at step {line['step']} | loss {line['validation/loss']:.4f}{tail}"
