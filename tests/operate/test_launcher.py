"""Ranks on one machine: signals reach them, they end in their own time, and a failed one ends the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kha_train.operate import launcher

RANK = """
import os, pathlib, signal, sys, time
place, kind, save_seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
rank = os.environ["RANK"]

def save(number, frame):
    time.sleep(save_seconds)
    (place / f"saved-{rank}").write_text(signal.Signals(number).name)
    sys.exit(0)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN if kind == "deaf" and rank == "1" else save)
(place / f"ready-{rank}").touch()
if kind != "waits" and rank == "0":
    while not (place / "ready-1").exists():
        time.sleep(0.01)
    sys.exit(5) if kind == "deaf" else os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_reaches_every_rank_and_they_save_in_their_own_time(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.1)
    # A shell starts background jobs with SIGINT ignored, which the launcher would leave so.
    outside = signal.signal(number, signal.SIG_DFL)

    def ask() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    code = launcher.launch(2, ["-c", RANK, str(tmp_path), "waits", "1.0"])
    asking.join()
    assert (code, signal.signal(number, outside)) == (0, signal.SIG_DFL)
    assert {path.read_text() for path in tmp_path.glob("saved-*")} == {number.name}
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_rank_that_fails_ends_the_others_even_deaf_ones_and_gives_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.2)
    assert launcher.launch(2, ["-c", RANK, str(tmp_path), "deaf", "0"]) == 5
    assert capfd.readouterr().err == ""


def test_a_rank_that_is_killed_has_one_line_and_the_others_are_asked_to_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launcher.launch(2, ["-c", RANK, str(tmp_path), "killed", "0"]) == 137
    assert capfd.readouterr().err.splitlines() == [
        "rank 0 was killed by SIGKILL; the same command continues from the newest checkpoint"
    ]
    assert (tmp_path / "saved-1").read_text() == "SIGTERM"


def test_a_killed_rank_is_the_cause_even_if_another_failed_of_it_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[Any] = [SimpleNamespace(poll=lambda code=code: code) for code in (0, 1, -9)]
    assert launcher._first_failure(ended) == 137
    assert capfd.readouterr().err.startswith("rank 2 was killed by SIGKILL")
    assert launcher._first_failure(ended[:2]) == 1
