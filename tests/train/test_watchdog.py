"""The watchdog names the hanging rank and ends the process. Each case is a process of its own, which mostly sleeps: all
start together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

from kha_train.record import first_failure_line
from kha_train.train import watchdog

PROGRAM = """
import json, sys, time
from pathlib import Path
from kha_train.distributed import World
from kha_train.train.watchdog import Watchdog

folder, beats, others, alive = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
world = World(0, 1, life="now")
with Watchdog(folder, world, 3.0) as watchdog:
    object.__setattr__(world, "size", 1 + len(others))
    for step in range(beats):
        watchdog.beat(step + 1, "training")
    for moment in range(70):
        for number, beat in enumerate(others, start=1):
            moves = {"moves": moment if alive == "neighbour" else 7}
            text = json.dumps({"rank": number, "life": "now", **moves, **beat})
            (folder / ".ranks" / f"rank-{number:05d}.json").write_text(text)
        if alive == "self":
            watchdog.alive()
        time.sleep(0.1)
"""


SAVING = {"beats": 3, "where": "step 3, saving", "written": 4}
SILENT = {"beats": 9, "where": "step 2, training", "written": 4}
LEFTOVERS = ("ALARM-before", "ALARM", "rank-00000.txt", "rank-00003.json")
CASES: dict[str, tuple[int, list[dict[str, Any]], str]] = {
    "still": (3, [], "nobody"),
    "silent neighbour": (3, [SILENT], "nobody"),
    "slow": (3, [SAVING], "self"),
    "slow neighbour": (3, [SAVING], "neighbour"),
    "neighbour of an earlier start": (3, [{**SILENT, "life": "before"}], "neighbour"),
    "after an alarm": (3, [], "self"),
    "first step": (1, [], "nobody"),
}
"""How often a process beats before it does nothing for seven seconds, what the ranks beside it have written, and who is
alive meanwhile. Its patience is 3 s: a busy machine may well keep a process waiting for one."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and its folder."""

    code: int
    said: str
    folder: Path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """Every case."""
    folders = {name: tmp_path_factory.mktemp("watched") for name in CASES}
    (folders["silent neighbour"] / ".ranks").mkdir()
    (folders["silent neighbour"] / ".ranks" / "life").write_text("now 2")
    (folders["after an alarm"] / "hang").mkdir()
    for leftover in LEFTOVERS:
        (folders["after an alarm"] / "hang" / leftover).write_text("{}")
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folders[name]), str(beats), json.dumps(others), alive],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (beats, others, alive) in CASES.items()
    }
    try:
        said = {name: process.communicate(timeout=300)[1] for name, process in processes.items()}
        yield {name: Ended(process.returncode, said[name], folders[name]) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.slow
def test_a_main_thread_that_stands_still_ends_with_its_stacks_and_75(ended: dict[str, Ended]) -> None:
    code, said, folder = astuple(ended["still"])
    assert code == 75
    assert "hang error: rank 0 has made no progress" in said and "in: step 3, training" in said
    assert "furthest behind: rank 0 in step 3" in said
    stacks = (folder / "hang" / "rank-00000.txt").read_text()
    assert 'File "<string>"' in stacks and "watchdog.py" in stacks


@pytest.mark.slow
def test_a_rank_that_writes_nothing_new_is_named(ended: dict[str, Ended]) -> None:
    code, said, folder = astuple(ended["silent neighbour"])
    assert code == 75
    assert first_failure_line(folder).startswith(
        "rank 1 failed first: rank 0 reports: hang error: rank 0 has made no progress"
    )
    assert "rank 1 does not respond, last seen in step 2, training" in said


@pytest.mark.slow
@pytest.mark.parametrize("case", ["slow", "slow neighbour"])
def test_slow_work_that_gets_on_is_no_hang(case: str, ended: dict[str, Ended]) -> None:
    """Neither for the rank that does it, nor for one that waits for it."""
    assert ended[case].code == 0, ended[case].said


@pytest.mark.slow
def test_a_neighbour_of_an_earlier_start_is_nobody(ended: dict[str, Ended]) -> None:
    code, said, _ = astuple(ended["neighbour of an earlier start"])
    assert code == 75
    assert "rank 1 was never seen" in said


@pytest.mark.slow
def test_what_an_earlier_start_left_raises_no_alarm_and_is_removed(ended: dict[str, Ended]) -> None:
    code, said, folder = astuple(ended["after an alarm"])
    assert code == 0, said
    assert not (folder / "hang").exists()


@pytest.mark.slow
def test_the_first_step_may_take_its_time(ended: dict[str, Ended]) -> None:
    assert ended["first step"].code == 0, ended["first step"].said


SUSPENDED = """
import sys, time
from pathlib import Path
from kha_train.distributed import World
from kha_train.train.watchdog import Watchdog

def work(seconds):
    # Counts what this process computes, which stands still while it is suspended.
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

with Watchdog(Path(sys.argv[1]), World(0, 1, life="now"), 8.0) as watchdog:
    for step in range(3):
        watchdog.beat(step + 1, "training")
    print("working", flush=True)
    work(1.0)
    print("done", flush=True)
    if sys.argv[2] == "hang":
        time.sleep(600)
"""


@pytest.mark.slow
def test_a_process_that_was_suspended_goes_on_and_a_hang_after_it_is_found(tmp_path: Path) -> None:
    processes = {
        then: subprocess.Popen(
            [sys.executable, "-c", SUSPENDED, str(tmp_path / then), then],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for then in ("end", "hang")
    }
    for process in processes.values():
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGSTOP)
    # Longer than their patience: this is the time that must not count.
    time.sleep(10)
    for process in processes.values():
        process.send_signal(signal.SIGCONT)
    for then, process in processes.items():
        said, complaint = process.communicate(timeout=120)
        assert said == "done\n", complaint
        assert process.returncode == (75 if then == "hang" else 0), complaint
        assert ("rank 0 has made no progress" in complaint) == (then == "hang")


def test_only_the_time_of_a_running_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks a second apart, then a suspension of 1,000 seconds, then ticks again: 3 + 1 + 2 seconds."""
    moments = iter([0.0, 1.0, 2.0, 3.0, 1003.0, 1004.0, 1005.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(moments))
    clock = watchdog._AwakeClock(1.0)
    for _ in range(6):
        clock.tick()
    assert clock.now == 6.0
