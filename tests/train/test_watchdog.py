"""The watchdog tells who hangs, and ends the process; alone in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
            (folder / "hang" / f"rank-{number:05d}.json").write_text(text)
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
    assert "hang error: rank 0 has stood still" in ended.stderr and "in: step 3, training" in ended.stderr
    assert "furthest behind: rank 0 in step 3" in ended.stderr
    stacks = (tmp_path / "hang" / "rank-00000.txt").read_text()
    assert 'File "<string>"' in stacks and "watchdog.py" in stacks


def test_a_rank_that_writes_nothing_new_is_named(tmp_path) -> None:
    silent = {"beats": 9, "where": "step 2, training", "written": 4}
    ended = watched(tmp_path, 3, silent)
    assert ended.returncode == 75
    assert "rank 1 does not answer, last seen in step 2, training" in ended.stderr


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
    assert not any(leftover.exists() for leftover in leftovers)


def test_the_first_step_may_take_its_time(tmp_path) -> None:
    assert watched(tmp_path, 1).returncode == 0
