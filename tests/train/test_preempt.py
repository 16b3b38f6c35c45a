"""A run is asked to stop, and reports its end to its batch script in files of that job alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kha_train.config.compose import compose
from kha_train.record import Marker, Record, has_marker, leave_outcome, set_marker
from kha_train.train.run import train
from kha_train.train.session import Session


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a batch script would read the outcome; its STOP is beside it."""
    monkeypatch.setenv("KHA_OUTCOME_FILE", str(tmp_path / "outcome"))
    monkeypatch.setenv("KHA_STOP_FILE", str(tmp_path / "STOP"))
    return tmp_path / "outcome"


def test_who_asked_to_stop_decides_whether_the_job_is_to_be_requeued(
    small: list[str], tmp_path: Path, told: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = compose([*small, "model.layers=1", "run.steps=3", "validation.every_steps=0", f"run.dir={run_dir}"])
    (tmp_path / "STOP").touch()
    assert train(config).step == 1 and told.read_text() == "requeue\n"
    (tmp_path / "STOP").unlink()
    set_marker(run_dir, Marker.STOP)
    assert train(config).step == 2 and told.read_text() == "stopped\n"
    assert not has_marker(run_dir, Marker.STOP) and has_marker(run_dir, Marker.REQUEUE)
    assert train(config).finished and told.read_text() == "done\n"
    assert [marker for marker in Marker if has_marker(run_dir, marker)] == [Marker.DONE]


def test_a_signal_amid_a_validation_stops_the_run_after_it(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate, said = Session.evaluate, ""

    def signalled(session: Session, tasks: Any) -> dict[str, float]:
        nonlocal said
        os.kill(os.getpid(), signal.SIGUSR1)
        # Another thread answers: the validation of so small a model would be over before.
        while "SIGUSR1" not in said:
            time.sleep(0.01)
            said += capfd.readouterr().err
        return evaluate(session, tasks)

    monkeypatch.setattr(Session, "evaluate", signalled)
    settings = [*small, "model.layers=1", "run.steps=4", "validation.every_steps=2", f"run.dir={tmp_path / 'run'}"]
    outcome = train(compose(settings))
    assert (outcome.step, outcome.finished) == (2, False)
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir() and has_marker(tmp_path / "run", Marker.REQUEUE)
    said += capfd.readouterr().err
    assert "SIGUSR1: waiting for the validation after step 2, then for the checkpoint" in said
    assert said.count("stopped in good order after step 2") == 1


@pytest.mark.slow
def test_an_outcome_that_does_not_fit_on_the_disk_leaves_the_one_before_and_the_exit_code(
    tmp_path: Path, told: Path, clean_environment: dict[str, str]
) -> None:
    leave_outcome("training")
    assert [path.name for path in tmp_path.iterdir()] == ["outcome"]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 0; exec "$@"', "limited", sys.executable, "-m", "kha_train", "run.steps=many"],
        env={**os.environ, **clean_environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "run.steps" in ended.stderr, ended.stderr
    assert told.read_text() == "training\n"


@pytest.mark.slow
def test_a_second_process_says_that_it_never_owned_the_run_and_leaves_every_marker(
    small: list[str], tmp_path: Path, told: Path, clean_environment: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    owner = Record.open(run_dir)
    for marker in Marker:
        set_marker(run_dir, marker, "the owner's")
    try:
        command = [sys.executable, "-m", "kha_train", *small, f"run.dir={run_dir}"]
        environment = {**os.environ, **clean_environment}
        second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        owner.close()
    assert second.returncode == 6 and told.read_text() == "fatal 6\n", second.stderr
    assert {(run_dir / marker.value).read_text() for marker in Marker} == {"the owner's\n"}
