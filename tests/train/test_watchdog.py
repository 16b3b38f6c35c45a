"""The watchdog tells who hangs, and ends the process; alone in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys, time
from pathlib import Path
from kha_train.distributed import World
from kha_train.train.watchdog import Watchdog

folder, beats, others = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
world = World(0, 1)
with Watchdog(folder, world, 0.4) as watchdog:
    object.__setattr__(world, "size", 1 + len(others))
    for number, beat in enumerate(others, start=1):
        (folder / "hang" / f"rank-{number:05d}.json").write_text(json.dumps({"rank": number, **beat}))
    for step in range(beats):
        watchdog.beat(step + 1, "training")
    time.sleep(3)
"""


def watched(folder: Path, beats: int, *others: dict) -> subprocess.CompletedProcess:
    """A process that beats so often and then sleeps, beside ranks that have written `others` once."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(beats), json.dumps(others)]
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


def test_the_first_step_may_take_its_time(tmp_path) -> None:
    assert watched(tmp_path, 1).returncode == 0
