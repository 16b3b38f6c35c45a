"""A signal is received while the main thread is in library code, and a second one ends the process there too."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kha_train.train.preempt import StopRequests
from kha_train.train.signals import SignalListener

LONG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 300_000_000)"
"""A call that would take minutes, releases the interpreter's lock and looks at no signal."""


def test_a_signal_is_heard_before_the_main_thread_returns_from_a_library() -> None:
    order: list[str] = []

    def hear(number: int) -> bool:
        order.append(signal.Signals(number).name)
        return False

    with SignalListener([signal.SIGUSR1], hear):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)
        order.append("returned")
        timer.join()
    assert order == ["SIGUSR1", "returned"]


@pytest.mark.parametrize("signals", ["SIGINT SIGINT", "SIGTERM SIGTERM", "SIGTERM SIGINT"])
def test_the_first_signal_says_what_is_waited_for_and_a_second_ends_the_process_at_once(
    signals: str, tmp_path: Path
) -> None:
    script = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from kha_train.train import preempt, signals\n"
        "preempt.ECHO_SECONDS = signals.GRACE_SECONDS = 0.1\n"
        "stops = preempt.StopRequests(Path(sys.argv[1]))\n"
        "stops.place = 'micro-batch 3 of 9 of step 7'\n"
        f"with stops:\n    print('ready', flush=True)\n    {LONG}\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
    first, second = (signal.Signals[name] for name in signals.split())
    process.send_signal(first)
    said = process.stderr.readline()
    name = "Ctrl-C" if first == signal.SIGINT else first.name
    assert said.startswith(f"{name}: waiting for micro-batch 3 of 9 of step 7, then for the checkpoint; a second ")
    threading.Event().wait(0.2)
    process.send_signal(second)
    assert process.wait(30) == 130
    assert "again: ending at once" in process.stderr.read()
    process.stdout.close()
    process.stderr.close()


def test_a_second_signal_that_comes_amid_a_finaliser_ends_the_process_all_the_same(tmp_path: Path) -> None:
    """What a handler raises there is dropped by the interpreter."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from kha_train.train import preempt, signals\n"
        "preempt.ECHO_SECONDS, signals.GRACE_SECONDS = 0.1, 600.0\n"
        "class Dropping:\n"
        "    def __del__(self):\n"
        "        print('ready', flush=True)\n"
        "        while True:\n"
        "            time.sleep(0.01)\n"
        "stops = preempt.StopRequests(Path(sys.argv[1]))\n"
        "try:\n"
        "    with stops:\n"
        "        Dropping()\n"
        "        for ask in (stops.check, stops.pending):\n"
        "            try:\n"
        "                ask()\n"
        "            except KeyboardInterrupt:\n"
        "                print('raised', flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('raised on leaving', flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("SIGTERM: waiting for ")
        threading.Event().wait(0.2)
        process.send_signal(signal.SIGTERM)
        said, complaints = process.communicate(timeout=30)
    assert "Exception ignored" in complaints and "KeyboardInterrupt" in complaints
    assert said.split("\n") == ["raised", "raised", "raised on leaving", ""]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_signal_to_a_forked_child_is_not_its_parents() -> None:
    heard: list[int] = []
    with SignalListener([signal.SIGUSR1, signal.SIGUSR2], lambda number: heard.append(number) or False) as listener:
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                listener.__exit__(None, None, None)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)
        os.kill(os.getpid(), signal.SIGUSR2)
    assert heard == [signal.SIGUSR2]


def test_echoes_of_a_signal_and_requests_of_slurm_are_no_second_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    stops = StopRequests(tmp_path, clock=lambda: now[0])
    heard = stops._hear
    assert not any(heard(signal.SIGUSR1) for _ in range(3))
    now[0] = 60.0
    assert not heard(signal.SIGTERM)
    now[0] = 60.3
    assert not heard(signal.SIGTERM) and not heard(signal.SIGUSR2)
    now[0] = 70.0
    assert not heard(signal.SIGUSR1) and heard(signal.SIGTERM)
    assert capsys.readouterr().err.count("waiting for") == 1


def test_a_request_to_another_rank_alone_is_told_once_on_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stops = StopRequests(tmp_path)
    stops.place = "micro-batch 3 of 9 of step 7"
    for told in (stops, stops, StopRequests(None)):
        told.tell_of_another()
    stops._hear(signal.SIGTERM)
    said = capsys.readouterr().err
    assert said.startswith("another rank was asked to stop: waiting for micro-batch 3 of 9 of step 7, then for the ")
    assert said.count("\n") == 1
    (tmp_path / "STOP").touch()
    StopRequests(tmp_path).tell_of_another()
    assert capsys.readouterr().err == ""


def test_other_ranks_than_the_first_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert not StopRequests(None)._hear(signal.SIGTERM)
    assert capsys.readouterr().err == ""
