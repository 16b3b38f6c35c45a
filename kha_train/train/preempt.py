"""Requests to stop in good order: a signal (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2), a STOP file in the run directory, or a
file that this job's batch script writes for signals that arrive before the process listens.

A thread receives signals at once and reports on rank 0 what the run is waiting for. The loop agrees on the request with
all ranks at the end of a step, or within a long one (`train.patience`), saves, and ends.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kha_train.config.schema import RunConfig
from kha_train.errors import tag
from kha_train.literal import say
from kha_train.record.markers import Marker, has_marker
from kha_train.train.signals import SignalListener

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
URGENT = (signal.SIGINT, signal.SIGTERM)
"""A second one of these signals ends the process at once. The others never do, however often they come."""
ECHO_SECONDS = 0.5
"""A signal within this time is the same request: `timeout` forwards what the whole group has received."""
TORCHRUN_ECHO_SECONDS = 2.0
"""The same under torchrun, which also forwards signals, and does so from Python."""


def time_warning(config: RunConfig, environ: Mapping[str, str] = os.environ, now: float | None = None) -> str:
    """A warning if `checkpoint.every_minutes` is longer than the time that is left by `run.max_minutes` and the end of
    the SLURM job, or is 0 while no number of steps saves on the way; "" where no end is known. `now`: seconds since
    the epoch.
    """
    every, most = config.checkpoint.every_minutes, config.run.max_minutes
    end = environ.get("SLURM_JOB_END_TIME", "")
    left = [most] if most else []
    left += [(int(end) - (time.time() if now is None else now)) / 60] if end.isdecimal() else []
    saves_by_steps = 0 < config.checkpoint.every_steps < config.run.steps
    if not left or (every <= min(left) if every else saves_by_steps):
        return ""
    due = max(1, int(min(left) / 4))
    never = "" if every else " (never)"
    return (
        f"warning: checkpoint.every_minutes = {every:g}{never}: {min(left):.0f} minutes are left, and a crash loses "
        f"them unless checkpoint.every_steps saves before; fix: checkpoint.every_minutes={due}{tag('E21')}"
    )


class StopRequests:
    """Inside the `with` block, `pending()` says whether this process was asked to stop. A second Ctrl-C or SIGTERM
    raises KeyboardInterrupt; if that is lost, `pending()` and `check()` raise it.

    Only one rank needs to look for the files, at every step: `run_dir` is None on the others, which also print nothing.
    After `max_minutes` (0: never) of a monotonic clock, the process itself requests to stop, for jobs with a time
    limit. `place` says what the process is doing, for the line printed at the first signal.
    """

    def __init__(
        self, run_dir: Path | None, max_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.place = "the start of the run and its first step"
        self._run_dir, self._clock = run_dir, clock
        self._job_file = Path(os.environ["KHA_STOP_FILE"]) if run_dir and "KHA_STOP_FILE" in os.environ else None
        self._deadline = clock() + 60 * max_minutes if max_minutes else math.inf
        self._urged_at = math.nan
        self._echo = TORCHRUN_ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else ECHO_SECONDS
        self._has_said = False
        self._listener = SignalListener(SIGNALS, self._hear)

    def __enter__(self) -> Self:
        self._listener.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.__exit__(kind, error, trace)

    def pending(self) -> bool:
        """Whether to stop after this step. Raises KeyboardInterrupt after a second Ctrl-C or SIGTERM."""
        self.check()
        if self._listener.has_heard or self._clock() >= self._deadline:
            return True
        # If the files cannot be read, there is no request, and this rank must not end alone within a step.
        with suppress(OSError):
            if self._job_file is not None and self._job_file.exists():
                return True
            return self._run_dir is not None and has_marker(self._run_dir, Marker.STOP)
        return False

    def check(self) -> None:
        """Raises KeyboardInterrupt after a second Ctrl-C or SIGTERM. Costs nothing."""
        self._listener.raise_if_ending()

    def tell_of_another(self) -> None:
        """The ranks agreed that one of them was asked to stop: report it on rank 0, unless it was asked itself."""
        if not self._has_said and not self.pending():
            self._announce("another rank was asked to stop")

    def _hear(self, number: int) -> bool:
        """Record a signal and report it on rank 0; returns whether it is the second one, which ends the process."""
        now = self._clock()
        if number in URGENT and now - self._urged_at > self._echo:
            self._say(f"{_name(number)} again: ending at once, without saving")
            return True
        if number in URGENT and math.isnan(self._urged_at):
            self._urged_at = now
        self._announce(_name(number))
        return False

    def _announce(self, reason: str) -> None:
        if not self._has_said:
            self._has_said = True
            self._say(
                f"{reason}: waiting for {self.place}, then for the checkpoint; "
                "a second Ctrl-C or SIGTERM ends the run at once, without saving"
            )

    def _say(self, text: str) -> None:
        if self._run_dir is not None:
            say(text, err=True)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
