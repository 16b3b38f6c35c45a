"""The watchdog names the hanging rank and ends the process; each runs in a separate process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kha_train.record import first_failure_line
from kha_train.train import watchdog

pytestmark = pytest.mark.slow

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


def watched(folder: Path, beats: int, *others: dict, alive: str = "nobody") -> subprocess.CompletedProcess:
    """A process that beats so often and then does nothing for seven seconds, `alive` or not, beside ranks that have
    written `others`. Its patience is 3 s: a busy machine may well keep a process waiting for one."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(beats), json.dumps(others), alive]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_a_main_thread_that_stands_still_ends_with_its_stacks_and_75(tmp_path) -> None:
    ended = watched(tmp_path, 3)
    assert ended.returncode == 75
    assert "hang error: rank 0 has made no progress" in ended.stderr and "in: step 3, training" in ended.stderr
    assert "furthest behind: rank 0 in step 3" in ended.stderr
    stacks = (tmp_path / "hang" / "rank-00000.txt").read_text()
    assert 'File "<string>"' in stacks and "watchdog.py" in stacks


def test_a_rank_that_writes_nothing_new_is_named(tmp_path) -> None:
    silent = {"beats": 9, "where": "step 2, training", "written": 4}
    (tmp_path / ".ranks").mkdir()
    (tmp_path / ".ranks" / "life").write_text("now 2")
    ended = watched(tmp_path, 3, silent)
    assert ended.returncode == 75
    assert first_failure_line(tmp_path).startswith(
        "rank 1 failed first: rank 0 reports: hang error: rank 0 has made no progress"
    )
    assert "rank 1 does not respond, last seen in step 2, training" in ended.stderr


@pytest.mark.parametrize("alive", ["self", "neighbour"])
def test_slow_work_that_gets_on_is_no_hang(alive, tmp_path) -> None:
    """Neither for the rank that does it, nor for one that waits for it."""
    ended = watched(tmp_path, 3, {"beats": 3, "where": "step 3, saving", "written": 4}, alive=alive)
    assert ended.returncode == 0, ended.stderr


def test_a_neighbour_of_an_earlier_start_is_nobody(tmp_path) -> None:
    dying = {"beats": 9, "where": "step 2, training", "written": 4, "life": "before"}
    ended = watched(tmp_path, 3, dying, alive="neighbour")
    assert ended.returncode == 75
    assert "rank 1 was never seen" in ended.stderr


def test_what_an_earlier_start_left_raises_no_alarm_and_is_removed(tmp_path) -> None:
    leftovers = [tmp_path / "hang" / name for name in ("ALARM-before", "ALARM", "rank-00000.txt", "rank-00003.json")]
    leftovers[0].parent.mkdir()
    for leftover in leftovers:
        leftover.write_text("{}")
    assert watched(tmp_path, 3, alive="self").returncode == 0
    assert not leftovers[0].parent.exists()


def test_the_first_step_may_take_its_time(tmp_path) -> None:
    assert watched(tmp_path, 1).returncode == 0


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
@pytest.mark.parametrize("then", ["end", "hang"])
def test_a_process_that_was_suspended_goes_on_and_a_hang_after_it_is_found(then: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(tmp_path), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGSTOP)
    # Longer than its patience: this is the time that must not count.
    time.sleep(10)
    process.send_signal(signal.SIGCONT)
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
