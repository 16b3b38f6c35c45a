"""A save or a pruning that dies at any point leaves the previous checkpoint readable and the next attempt working."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from kha_train.checkpoint.background import write
from kha_train.checkpoint.layout import candidates
from kha_train.checkpoint.reader import find_newest, verify
from kha_train.checkpoint.retention import Keep, prune
from kha_train.checkpoint.writer import Stage
from kha_train.distributed import World
from kha_train.errors import CheckpointError


def die_at(wanted: str) -> Callable[[str], None]:
    def stage(name: str) -> None:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return stage


def killed(body: Callable[[], object]) -> bool:
    """Run `body` in a child process; True when SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("stage", [name for name in get_args(Stage) if name != "between_renames"])
def test_a_kill_during_a_first_save_of_a_step_leaves_the_previous_one(tmp_path, save, holds, stage) -> None:
    save(tmp_path, 10)
    assert killed(lambda: save(tmp_path, 20, stage=die_at(stage)))
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 20 if stage == "after_rename" else 10)
    save(tmp_path, 20, size=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 20)


@pytest.mark.parametrize("stage", get_args(Stage))
def test_a_kill_while_the_only_step_is_saved_again_leaves_the_old_or_the_new(tmp_path, save, holds, stage) -> None:
    save(tmp_path, 10, seed=1)
    assert killed(lambda: save(tmp_path, 10, seed=2, stage=die_at(stage)))
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 2 if stage == "after_rename" else 1)
    save(tmp_path, 10, seed=3)
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 3)
    prune(tmp_path, Keep(1))
    assert names(tmp_path) == ["step-00000010"]
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 3)


def test_saving_a_step_again_replaces_it_and_leaves_nothing_behind(tmp_path, save, holds) -> None:
    for seed in (1, 2, 2):
        save(tmp_path, 10, seed=seed, size=2)
        assert names(tmp_path) == ["step-00000010"]
        assert holds(find_newest(tmp_path, World.single(), pytest.fail), seed)


@pytest.mark.parametrize("blockage", ["empty directory", "partial directory", "file", "link"])
def test_a_partial_directory_under_the_final_name_does_not_block_the_save(tmp_path, save, holds, blockage) -> None:
    final = tmp_path / "checkpoints" / "step-00000010"
    final.parent.mkdir()
    if blockage == "file":
        final.write_bytes(b"x")
    elif blockage == "link":
        final.symlink_to(tmp_path)
    else:
        final.mkdir()
    if blockage == "partial directory":
        (final / "model-00000.safetensors").write_bytes(b"half")
    save(tmp_path, 10, size=3)
    assert names(tmp_path) == ["step-00000010"]
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 10)


@pytest.mark.parametrize("moment", ["before_prune", "mid_prune", "amid the files"])
def test_a_kill_while_pruning_leaves_only_whole_checkpoints(tmp_path, save, holds, moment) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)

    def die_after_one_file(directory: Path) -> None:
        (directory / "model-00000.safetensors").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        if moment == "amid the files":
            shutil.rmtree = die_after_one_file
        prune(tmp_path, Keep(2), stage=die_at(moment))

    assert killed(body)
    for _, directory in candidates(tmp_path / "checkpoints"):
        verify(directory)
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 4)
    prune(tmp_path, Keep(2))
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stage", get_args(Stage)[:4])
def test_an_error_on_one_rank_is_raised_on_all_and_the_disk_is_as_before(
    tmp_path, save, own_pieces, make_state, run_ranks, holds, size, stage
) -> None:
    save(tmp_path, 10)
    failing = size - 1 if stage in ("first_shard", "mid_shard") else 0

    def body(world: World) -> Path:
        def fail(name: str) -> None:
            if name == stage and world.rank == failing:
                raise OSError(28, "No space left on device")

        return write(tmp_path, 20, world, own_pieces(make_state(20), world.rank, size), {}, {}, stage=fail)

    for outcome in run_ranks(size, body):
        assert isinstance(outcome, CheckpointError) and "No space left on device" in str(outcome), outcome
    assert names(tmp_path) == ["step-00000010"]
    assert holds(find_newest(tmp_path, World.single(), pytest.fail), 10)


def test_an_error_while_drawing_pieces_is_raised_on_all_ranks(tmp_path, run_ranks, own_pieces, make_state) -> None:
    def body(world: World) -> Path:
        def pieces():
            yield from own_pieces(make_state(), world.rank, 3)[:4]
            if world.rank == 1:
                raise RuntimeError("the device is gone")
            yield from own_pieces(make_state(), world.rank, 3)[4:]

        return write(tmp_path, 1, world, pieces(), {}, {})

    outcomes = run_ranks(3, body)
    assert all("the device is gone" in str(outcome) for outcome in outcomes), outcomes
    assert names(tmp_path) == []


TWO_RANKS = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import find_newest
from kha_train.checkpoint.background import write
from kha_train.distributed import World

run_dir, rank, rendezvous, stage = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
world = World(rank, 2)

def die(name):
    if name == stage and rank == 1:
        os.killpg(os.getpgid(0), signal.SIGKILL)

def save(step, stage=lambda name: None):
    values = torch.full((500,), float(step))
    pieces = [Piece("p", kind, (1000,), 500 * rank, values) for kind in ("master", "exp_avg", "exp_avg_sq")]
    write(run_dir, step, world, pieces, {}, {"step": step}, stage=stage)

found = find_newest(run_dir, world, lambda line: sys.exit("unexpected: " + line))
if found is None:
    save(1)
save(2, die)
found = find_newest(run_dir, world, lambda line: sys.exit("unexpected: " + line))
assert found.read("p", "exp_avg", 499, 2).tolist() == [2.0, 2.0] and found.trainer_state == {"step": 2}
world.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_gloo_processes_killed_amid_a_shard_resume_and_save_the_same_step(tmp_path) -> None:
    def launch(attempt: int, stage: str) -> list[int]:
        """Both ranks in one process group of their own: rank 0 leads it, rank 1 joins."""
        ranks: list[subprocess.Popen] = []
        for rank in range(2):
            arguments = [str(tmp_path), str(rank), str(tmp_path / f"meet{attempt}"), stage]
            command = [sys.executable, "-c", TWO_RANKS, *arguments]
            group = ranks[0].pid if ranks else 0
            ranks.append(subprocess.Popen(command, process_group=group, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        return [process.wait(60) for process in ranks]

    assert launch(1, "mid_shard") == [-signal.SIGKILL, -signal.SIGKILL]
    found = find_newest(tmp_path, World.single(), pytest.fail)
    assert found.step == 1 and found.read("p", "master").tolist() == [1.0] * 1000
    assert launch(2, "never") == [0, 0]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
