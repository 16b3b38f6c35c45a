"""Lost checkpoints are detected from the events of a run and from the content of its directory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kha_train.checkpoint import loss
from kha_train.checkpoint.loss import check_not_lost, lost_checkpoints
from kha_train.errors import CheckpointError

STARTED, RESUMED = {"kind": "attempt_started", "step": 0}, {"kind": "attempt_started", "step": 10}
SAVED = {"kind": "checkpoint_saved", "step": 10}


def run_with(tmp_path: Path, *events: dict[str, Any]) -> Path:
    """A run directory whose record holds `events`."""
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


def missing(folder: Path) -> None:
    """There is no such directory."""


def dangling(folder: Path) -> None:
    """Scratch is not mounted."""
    folder.symlink_to(folder.parent / "scratch" / "checkpoints")


def steps_dangling(folder: Path) -> None:
    """Scratch, where the step directories are, is not mounted."""
    folder.mkdir()
    (folder / "step-00000010").symlink_to(folder.parent / "scratch" / "step-00000010")


def a_file(folder: Path) -> None:
    """Something else has this name."""
    folder.write_text("")


def all_damaged(folder: Path) -> None:
    """An earlier start found that none passes verification."""
    (folder / "step-00000010.corrupt").mkdir(parents=True)


def unfinished(folder: Path) -> None:
    """A save or a deletion was interrupted: nothing that can be read."""
    (folder / ".step-00000012.saving-0123456789ab").mkdir(parents=True)
    (folder / "step-00000004.undone").mkdir()


LOSSES = {
    missing: "is missing",
    dangling: "is a link to .*scratch/checkpoints, which does not exist",
    steps_dangling: "holds only dangling links, such as step-00000010 to .*scratch/step-00000010",
    a_file: "is not a directory",
    all_damaged: "holds only damaged ones, set aside as step-00000010.corrupt",
    unfinished: "holds none",
}


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_checkpoints_that_the_events_name_and_that_cannot_be_found_are_lost(lose, tmp_path: Path) -> None:
    run_dir = run_with(tmp_path, STARTED, SAVED)
    lose(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=f"the last one at step 10, but .*checkpoints {LOSSES[lose]}") as error:
        check_not_lost(run_dir)
    assert error.value.exit_code == 4


def test_a_directory_that_may_not_be_read_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind root, who may run this test."""
    run_dir = run_with(tmp_path, STARTED, SAVED)
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)

    def forbidden(folder: Path) -> list[tuple[int, Path]]:
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="cannot be read .Permission denied"):
        patched.setattr(loss.layout, "candidates", forbidden)
        check_not_lost(run_dir)
    assert lost_checkpoints(run_dir) == ""


def test_a_disk_that_fails_has_lost_nothing_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command may find them when it is started again, so the exit code is another one."""

    def failing(folder: Path) -> list[tuple[int, Path]]:
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr(loss.layout, "candidates", failing)
    with pytest.raises(OSError, match="Input/output error"):
        check_not_lost(run_with(tmp_path, STARTED, SAVED))


@pytest.mark.parametrize("lose", [missing, all_damaged, unfinished])
def test_nothing_is_lost_before_the_first_save(lose, tmp_path: Path) -> None:
    run_dir = run_with(tmp_path, STARTED)
    lose(run_dir / "checkpoints")
    assert lost_checkpoints(run_dir) == ""


@pytest.mark.parametrize("lose", [dangling, steps_dangling, a_file])
def test_what_is_in_the_way_of_every_save_is_named_before_the_first_one_is_due(lose, tmp_path: Path) -> None:
    run_dir = run_with(tmp_path)
    lose(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=f"checkpoints {LOSSES[lose]}"):
        check_not_lost(run_dir)


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ESTALE])
def test_a_step_on_a_file_system_that_has_gone_is_absent(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_with(tmp_path, STARTED, SAVED)
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
    stat = os.stat

    def gone(path: Path, **options: Any) -> os.stat_result:
        if Path(path).name == "step-00000010" and options.get("follow_symlinks", True):
            raise OSError(code, os.strerror(code), str(path))
        return stat(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr("kha_train.checkpoint.layout.os.stat", gone)
        assert "step 10" in lost_checkpoints(run_dir)
    assert lost_checkpoints(run_dir) == ""


@pytest.mark.parametrize("name", ["step-00000004", ".step-00000010.replaced-0123456789ab"])
def test_an_older_checkpoint_is_enough(name: str, tmp_path: Path) -> None:
    run_dir = run_with(tmp_path, STARTED, SAVED)
    (run_dir / "checkpoints" / name).mkdir(parents=True)
    assert lost_checkpoints(run_dir) == ""


def test_a_run_that_has_started_over_misses_nothing_of_before(tmp_path: Path) -> None:
    """Earlier releases started over without asking: such a run continues, and is not refused forever."""
    assert lost_checkpoints(run_with(tmp_path, STARTED, SAVED, RESUMED, STARTED)) == ""


def test_a_run_that_has_been_resumed_misses_what_was_saved_before(tmp_path: Path) -> None:
    assert "step 10" in lost_checkpoints(run_with(tmp_path, STARTED, SAVED, RESUMED))


def test_the_named_command_makes_room_for_a_new_run_each_time(tmp_path: Path) -> None:
    for number in range(2):
        run_dir = run_with(tmp_path, STARTED, SAVED)
        with pytest.raises(CheckpointError) as error:
            check_not_lost(run_dir)
        command = str(error.value).split("`")[1]
        subprocess.run(command, shell=True, check=True)
        assert not run_dir.exists() and lost_checkpoints(run_dir) == ""
        assert len(list(tmp_path.glob("my run.before*/events.jsonl"))) == number + 1
