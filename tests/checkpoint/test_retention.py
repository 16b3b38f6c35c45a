"""Pruning keeps the newest valid checkpoints and everything that must be kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.checkpoint.hold import alone
from kha_train.checkpoint.reader import find_newest, open_verified, verify
from kha_train.checkpoint.retention import Keep, mark, prune
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory, save) -> Path:
    run_dir = tmp_path_factory.mktemp("ten")
    for step in range(1, 11):
        save(run_dir, step)
    return run_dir


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    present=st.sets(st.integers(1, 10)),
    damaged=st.sets(st.integers(1, 10)),
    protect=st.sets(st.integers(1, 12)),
    marked=st.sets(st.integers(1, 12), max_size=3),
    keep_last=st.integers(1, 5),
    every=st.sampled_from([0, 3, 4]),
)
def test_what_stays_is_the_newest_valid_the_protected_and_the_damaged(
    ten_steps, present, damaged, protect, marked, keep_last, every
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir, checkpoints = Path(folder), Path(folder) / "checkpoints"
        checkpoints.mkdir()
        for step in present:
            shutil.copytree(ten_steps / "checkpoints" / f"step-{step:08d}", checkpoints / f"step-{step:08d}")
            if step in damaged:
                with open(checkpoints / f"step-{step:08d}" / "optimizer-00000.safetensors", "r+b") as file:
                    file.seek(-1, 2)
                    file.write(b"\x55")
        valid = present - damaged
        newest = set(sorted(valid)[-keep_last:])
        stay = newest | (valid & (protect | marked | {step for step in valid if every and step % every == 0}))
        stay |= present & damaged
        for step in marked:
            mark(checkpoints, step, keep=True)
        keep = Keep(keep_last, every, frozenset(protect))
        assert prune(run_dir, keep, check=verify, dry_run=True) == sorted(present - stay)
        assert {int(path.name[5:]) for path in checkpoints.glob("*[0-9]")} == present
        assert prune(run_dir, keep, check=verify) == sorted(present - stay)
        assert {int(path.name[5:]) for path in checkpoints.glob("*[0-9]")} == stay
        found = find_newest(run_dir, World.single(), lambda line: None)
        assert (found.step if found else None) == max(valid, default=None)


@pytest.mark.parametrize("trouble", ["missing", "truncated", "partial directory"])
def test_a_newer_directory_that_is_not_whole_does_not_count_as_kept(tmp_path, save, trouble) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    if trouble == "truncated":
        os.truncate(path / "model-00000.safetensors", 100)
    else:
        (path / {"missing": "trainer.json", "partial directory": "manifest.json"}[trouble]).unlink()
    assert prune(tmp_path, Keep(1)) == []
    assert find_newest(tmp_path, World.single(), lambda line: None).step == 1


def test_pruning_removes_only_what_prunings_left(tmp_path, save) -> None:
    folder = save(tmp_path, 1).parent
    leftover, being_written = ".step-00000002.deleting-0123456789ab", ".step-00000003.saving-0123456789ab"
    strangers = [".step-00000002.deleting-mine", "notes", "step-2", "step-00000001.corrupt", being_written]
    for name in [leftover, *strangers]:
        (folder / name).mkdir()
    prune(tmp_path, Keep(1))
    assert {path.name for path in folder.iterdir()} == {"step-00000001", *strangers}


def test_keeping_none_is_a_configuration_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="checkpoint.keep_last"):
        prune(tmp_path, Keep(0))
    assert prune(tmp_path, Keep(1)) == []


def test_a_checkpoint_that_another_run_reads_stays_until_it_has_been_read(ten_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(ten_steps, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    with ExitStack() as reading:
        held_by_two = [open_verified(folder / "step-00000003", World.single(), reading) for _ in range(2)]
        assert prune(tmp_path, Keep(2)) == [1, 2, 4, 5, 6, 7, 8]
        assert {path.name for path in folder.iterdir()} == {f"step-{step:08d}" for step in (3, 9, 10)}
        assert verify(held_by_two[0].path).step == 3
    assert prune(tmp_path, Keep(2)) == [3]


def test_a_checkpoint_that_is_being_removed_is_not_read(ten_steps: Path) -> None:
    directory = ten_steps / "checkpoints" / "step-00000003"
    with alone(directory) as free, pytest.raises(CheckpointError, match="its run is removing it"):
        assert free
        open_verified(directory, World.single(), ExitStack())


def test_what_another_process_removes_meanwhile_stops_no_pruning(ten_steps: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(ten_steps / "checkpoints", checkpoints)

    def gone(stage: str) -> None:
        if stage == "before_prune":
            shutil.rmtree(checkpoints / "step-00000002")

    assert prune(tmp_path, Keep(7), stage=gone) == [1, 3]
    assert len(list(checkpoints.iterdir())) == 7
