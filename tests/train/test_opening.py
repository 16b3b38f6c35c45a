"""How a start treats a finished run, and a run whose checkpoints are gone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kha_train.cli.main import run as kha
from kha_train.config.compose import compose
from kha_train.decode.generate import load_run
from kha_train.errors import CheckpointError, ConfigError, DataError, ResumeError
from kha_train.operate.status import run_status
from kha_train.record import Marker, Record, has_marker, read_run, set_marker
from kha_train.train import opening
from kha_train.train.run import Outcome, train

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def finished(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Settings, and the directory of a run of six steps that saved after 2, 4 and 6."""
    settings = [*small, "model.layers=1", "run.steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=3"]
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(compose([*settings, f"run.dir={run_dir}"])).finished
    return settings, run_dir


@pytest.fixture
def run_dir(finished: tuple[list[str], Path], tmp_path: Path) -> Path:
    """A copy of the finished run that a test may hurt."""
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def again(finished: tuple[list[str], Path], run_dir: Path) -> Train:
    """`again(*overrides)`: the same command once more."""
    return lambda *overrides: train(compose([*finished[0], f"run.dir={run_dir}", *overrides]))


def content(run_dir: Path) -> dict[str, bytes]:
    """All that is in the directory, but for the file that a lock needs and the heartbeats of the watchdog."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def unmount(run_dir: Path) -> None:
    """As where scratch is not there: the link leads nowhere."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").symlink_to("/nowhere/scratch/checkpoints")


def empty(run_dir: Path) -> None:
    """As a mount point without its file system."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()


def remove(run_dir: Path) -> None:
    """The directory is gone."""
    shutil.rmtree(run_dir / "checkpoints")


def unmount_steps(run_dir: Path) -> None:
    """As where only the step directories are links to scratch."""
    for step in sorted((run_dir / "checkpoints").glob("step-*")):
        shutil.rmtree(step)
        step.symlink_to(f"/nowhere/scratch/{step.name}")


LOST = pytest.mark.parametrize("lose", [unmount, unmount_steps, empty, remove], ids=lambda lose: lose.__name__)


@LOST
def test_a_run_whose_checkpoints_are_gone_is_refused_and_nothing_of_it_changes(
    lose, run_dir: Path, again: Train
) -> None:
    (run_dir / "DONE").unlink()
    set_marker(run_dir, Marker.REQUEUE, "step 6, by a signal")
    lose(run_dir)
    before, names = content(run_dir), sorted(run_dir.glob("checkpoints/*"))
    with pytest.raises(CheckpointError, match="has saved checkpoints, the last one at step 6") as error:
        again()
    assert error.value.exit_code == 4 and content(run_dir) == before
    assert sorted(run_dir.glob("checkpoints/*")) == names and not has_marker(run_dir, Marker.FATAL)
    assert "step 6" in run_status(run_dir).note and run_status(run_dir).state == "requeue"


@LOST
def test_a_finished_run_ends_at_once_although_its_checkpoints_are_gone(lose, run_dir: Path, again: Train) -> None:
    lose(run_dir)
    before = content(run_dir)
    assert again() == again("run.steps=4") == Outcome(True, 6, run_dir)
    assert content(run_dir) == before


def test_a_finished_run_ends_at_once_although_its_events_are_gone_too(run_dir: Path, again: Train) -> None:
    remove(run_dir)
    (run_dir / "events.jsonl").unlink()
    before = content(run_dir)
    assert again() == Outcome(True, 6, run_dir)
    assert content(run_dir) == {**before, "events.jsonl": b""}


@pytest.mark.slow
def test_a_finished_run_that_is_asked_for_more_is_refused_where_its_checkpoints_are_gone(
    run_dir: Path, again: Train
) -> None:
    unmount(run_dir)
    before = content(run_dir)
    for overrides in (("run.steps=8", "resume.allow_changes=[run.steps]"), ("optim.lr=0.5",)):
        with pytest.raises(CheckpointError, match="does not start over unless asked"):
            again(*overrides)
    assert content(run_dir) == before and has_marker(run_dir, Marker.DONE)


def test_a_finished_run_begins_no_attempt_and_says_so(
    run_dir: Path, again: Train, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KHA_OUTCOME_FILE", str(tmp_path / "outcome"))
    before = content(run_dir)
    assert again() == Outcome(True, 6, run_dir)
    said = capfd.readouterr().out
    assert "all 6 steps are trained already" in said and f"kha compare {run_dir}" in said and "Train longer" in said
    assert content(run_dir) == before
    assert (tmp_path / "outcome").read_text() == "done\n"


def test_a_finished_run_with_other_settings_is_refused_and_stays_done(run_dir: Path, again: Train) -> None:
    with pytest.raises(ResumeError, match="optim.lr"):
        again("optim.lr=0.5")
    assert has_marker(run_dir, Marker.DONE) and not has_marker(run_dir, Marker.FATAL)


@pytest.mark.slow
def test_a_run_with_an_older_checkpoint_left_goes_on_from_it(run_dir: Path, again: Train) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    assert again().finished
    assert [attempt["start_step"] for attempt in read_run(run_dir)["attempts"]] == [0, 4]


@pytest.mark.slow
def test_a_run_killed_before_its_first_save_starts_from_its_beginning(run_dir: Path, again: Train) -> None:
    remove(run_dir)
    (run_dir / "DONE").unlink()
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] != "checkpoint_saved"]
    (run_dir / "events.jsonl").write_text("".join(kept))
    assert again().finished
    assert [attempt["start_step"] for attempt in read_run(run_dir)["attempts"]] == [0, 0]


@pytest.mark.slow
def test_the_command_that_the_refusal_names_starts_the_run_over(run_dir: Path, again: Train) -> None:
    (run_dir / "DONE").unlink()
    empty(run_dir)
    with pytest.raises(CheckpointError) as error:
        again()
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    assert again().finished and len(read_run(run_dir)["attempts"]) == 1


@pytest.mark.parametrize("command", [["checkpoint", "list"], ["checkpoint", "verify"], ["generate", "--prompt", "a"]])
def test_the_other_commands_say_so_too(command: list[str], run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unmount(run_dir)
    with pytest.raises(SystemExit) as ended:
        kha([*command, str(run_dir)])
    assert ended.value.code == 4 and "is a link to /nowhere/scratch" in capfd.readouterr().err


def test_a_run_does_not_inherit_from_one_whose_checkpoints_are_gone(
    run_dir: Path, finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    unmount(run_dir)
    with pytest.raises(CheckpointError, match="has saved checkpoints, the last one at step 6, but .* is a link to"):
        train(compose([*finished[0], f"run.dir={tmp_path}/new", f"run.init_from={run_dir}"]))


def test_a_model_is_not_loaded_from_a_run_whose_checkpoints_are_gone(run_dir: Path) -> None:
    empty(run_dir)
    with pytest.raises(CheckpointError, match="step 6"):
        load_run(run_dir, print)


REFUSALS = {
    "more steps than the schedule had": (["run.steps=3001"], 3),
    "another rate": (["optim.lr=0.5"], 3),
    "another vocabulary": (["model.vocab_size=512"], 2),
    "no such data": (["data.train=/nowhere"], 2),
    "other shapes": (["model.layers=2"], 3),
    "an unknown setting": (["model.kvheads=2"], 2),
}


@pytest.fixture
def command(
    finished: tuple[list[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """`command(*overrides)`: `kha train ...`; its exit code and standard error."""

    def call(*overrides: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            kha(["train", *finished[0], *overrides])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        return ended.value.code or 0, capfd.readouterr().err

    return call


@pytest.mark.parametrize("marker", [Marker.DONE, Marker.REQUEUE, None], ids=["done", "requeue", "killed"])
def test_a_refused_command_changes_nothing_of_a_run(
    marker: Marker | None, run_dir: Path, command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KHA_OUTCOME_FILE", str(tmp_path / "outcome"))
    (run_dir / "DONE").unlink()
    if marker:
        set_marker(run_dir, marker, "step 6")
    before, state = content(run_dir), run_status(run_dir).state
    for overrides, code in REFUSALS.values():
        ended, said = command(f"run.dir={run_dir}", *overrides)
        assert ended == code, said
        assert content(run_dir) == before and run_status(run_dir).state == state
        # The batch script must not start it again either.
        assert (tmp_path / "outcome").read_text() == f"fatal {code}\n"


@pytest.mark.parametrize("made", ["", "there"], ids=["new", "existing"])
def test_a_refused_command_leaves_no_directory_and_no_file(
    made: str, command: Callable, finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    if made:
        (tmp_path / "deep" / "run").mkdir(parents=True)
    refusals = [*REFUSALS.values()][2:4]
    refusals.append(([f"run.init_from={finished[1]}", "moe.expert_width=32"], 3))
    for overrides, code in refusals:
        ended, said = command(f"run.dir={tmp_path}/deep/run", *overrides)
        assert ended == code, said
        assert not made or list((tmp_path / "deep" / "run").iterdir()) == []
        assert bool(made) == (tmp_path / "deep").exists()


def test_damaged_data_mark_a_new_run_fatal_and_no_run_that_ended_in_good_order(
    run_dir: Path, again: Train, dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset / "train", tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    (run_dir / "DONE").unlink()
    set_marker(run_dir, Marker.REQUEUE, "step 6, by a signal")
    for place, fatal in ((run_dir, False), (tmp_path / "fresh", True)):
        with pytest.raises(DataError):
            again(f"data.train={tmp_path}/damaged", f"run.dir={place}")
        assert has_marker(place, Marker.FATAL) == fatal
    assert run_status(run_dir).state == "requeue"


def test_a_run_directory_that_can_never_be_written_is_a_mistake_and_no_failing_machine(
    finished: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(run_dir: Path, rank: int = 0) -> Record:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(run_dir))

    monkeypatch.setattr(Record, "open", read_only)
    with pytest.raises(ConfigError, match=r"run\.dir = .*Read-only file system; fix: .*run\.dir=PATH"):
        train(compose([*finished[0], f"run.dir={tmp_path / 'new'}"]))


def test_a_measured_backend_is_not_said_to_be_chosen_by_the_user(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "measured, forward and backward of a layer: eager 1.00 ms, sdpa 2.00 ms"
    monkeypatch.setattr(opening, "measure", lambda config, device, earlier: f"eager {words}")
    train(compose([*small, "model.layers=1", "attention.backend=auto", "run.steps=1", f"run.dir={tmp_path}"]))
    provenance = read_run(tmp_path)["provenance"]
    assert provenance["attention_backend"] == "eager" and provenance["chosen"][1] == words
    assert "backend eager (measured, see below)" in provenance["chosen"][0]
