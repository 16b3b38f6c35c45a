"""Anything with the name of a file or directory that a start writes is moved aside: it stops no run and is not
deleted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.distributed import World
from kha_train.train.failure import forget_failures, leave_failure
from kha_train.train.watchdog import Watchdog

WORLD = World(life="now")
NAMES = [
    "errors", "errors/rank-00000.json", ".ranks", ".ranks/life", ".ranks/rank-00000.json", "hang/rank-00003.txt",
]  # fmt: skip


def block(path: Path) -> None:
    """A file where a directory belongs, a directory that holds something where a file does."""
    path.parent.mkdir(exist_ok=True)
    if path.name not in ("errors", ".ranks"):
        path.mkdir()
        (path / "note.txt").write_text("mine")
    else:
        path.write_text("mine")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_the_way_of_failures_and_beats_is_moved_aside_once(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    block(run_dir / name)
    for _ in range(2):
        forget_failures(run_dir, WORLD)
        assert leave_failure(run_dir, WORLD, {"error": "e", "traceback": ""})
        with Watchdog(run_dir, WORLD, 60.0):
            assert (run_dir / ".ranks" / "rank-00000.json").is_file()
        assert (run_dir / "errors" / "rank-00000.json").is_file()
    (aside,) = run_dir.rglob("aside-*")
    assert "mine" in (aside.read_text() if aside.is_file() else (aside / "note.txt").read_text())


def test_a_healthy_start_makes_no_folder_of_failures_and_removes_those_of_an_earlier_release(tmp_path: Path) -> None:
    for name in ("errors/life", "errors/rank-00000.json", "hang/rank-00000.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for _ in range(2):
        forget_failures(tmp_path, WORLD)
        with Watchdog(tmp_path, WORLD, 60.0):
            assert [path.name for path in tmp_path.iterdir()] == [".ranks"]
