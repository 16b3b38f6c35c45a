"""Runs the points of a sweep on this machine, one after another or several at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kha_train.config.compose import shipped
from kha_train.operate.sweep import Point

POLL_SECONDS = 0.5
Training = subprocess.Popen[bytes]


def run_points(
    directory: Path,
    points: Sequence[Point],
    processes: int,
    watch: Callable[[Sequence[Point], Sequence[Point]], None],
    parallel: int = 1,
) -> list[Point]:
    """Train every point on `processes` ranks, `parallel` points at a time; returns those that failed. Output goes to
    `<sweep>/logs/<label>.out`.

    `watch` is called about twice a second with the points that are training and those that have not begun. On Ctrl-C,
    SIGTERM or SIGHUP the points that are training save and stop, no further one begins, and KeyboardInterrupt is
    raised. Another signal is passed on to them. An error stops them too.
    """
    failed: list[Point] = []
    waiting, training = list(points), dict[Training, Point]()
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    with signals_interrupt():
        try:
            while waiting or training:
                while waiting and len(training) < parallel:
                    point = waiting.pop(0)
                    training[_start(directory, point, processes)] = point
                with suppress(subprocess.TimeoutExpired):
                    next(iter(training)).wait(POLL_SECONDS)
                ended = [process for process in training if process.poll() is not None]
                failed += [point for process in ended if (point := training.pop(process)) and process.returncode]
                watch(list(training.values()), waiting)
        finally:
            _stop(training)
    return failed


def _start(directory: Path, point: Point, processes: int) -> Training:
    """Several ranks need a launcher. A session of its own: signals reach the training from here alone, once each."""
    script = ["bash", str(shipped("launch") / "local.sh")]
    command = script if processes > 1 else [sys.executable, "-m", "kha_train"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "KHA_PYTHON": sys.executable, "NPROC": str(processes)}
    with (directory / "logs" / f"{point.label}.out").open("ab") as log:
        return subprocess.Popen(
            [*command, *point.overrides],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _stop(training: Iterable[Training]) -> None:
    """Ask every process to stop and wait for it; ask again on each further signal."""
    alive = [process for process in training if process.poll() is None]
    try:
        for process in alive:
            process.terminate()
        for process in alive:
            process.wait()
    except KeyboardInterrupt:
        _stop(alive)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does. Only the main thread can receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
