"""Runs the points of a sweep one after another on this machine, with the script that a single run uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kha_train.config.compose import shipped
from kha_train.operate.sweep import Point

POLL_SECONDS = 0.5


def run_points(directory: Path, points: Sequence[Point], processes: int, watch: Callable[[Point], None]) -> list[Point]:
    """Train every point on `processes` ranks; returns those that failed. Output goes to `<sweep>/logs/<label>.out`.

    `watch` is called about twice a second with the point that is training. On KeyboardInterrupt, the sweep ends after
    the current run: Ctrl-C reaches the training too, which saves and stops.
    """
    failed = []
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "KHA_PYTHON": sys.executable, "NPROC": str(processes)}
    for point in points:
        with (directory / "logs" / f"{point.label}.out").open("ab") as log:
            command = ["bash", str(shipped("launch") / "local.sh"), *point.overrides]
            training = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        code = _wait(training, partial(watch, point))
        if code:
            failed.append(point)
    return failed


def _wait(training: subprocess.Popen[bytes], watch: Callable[[], None]) -> int:
    try:
        while True:
            try:
                return training.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                watch()
    except KeyboardInterrupt:
        training.wait()
        raise
