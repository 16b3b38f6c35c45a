"""One owner a run directory: on one machine, across machines without common locks, and over a requeue."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kha_train.errors import RunDirectoryInUse
from kha_train.record import lock, read_owner
from kha_train.record.lock import OWNER_FILE, RunLock

HOLDER = """
import sys; from pathlib import Path; import kha_train.record.lock as lock
lock.BEAT_SECONDS = 0.1
held = lock.RunLock(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""
ELSEWHERE = {"token": "theirs", "process": 7, "host": "another", "job": "40", "restart": "0", "beat": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def holder(run_dir: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `run_dir`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def beating(run_dir: Path) -> Iterator[None]:
    """An owner on another machine, alive."""
    begun, stop = threading.Event(), threading.Event()

    def beat() -> None:
        for number in itertools.count():
            beside = run_dir / "beside"
            beside.write_text(json.dumps({**ELSEWHERE, "beat": number}))
            os.replace(beside, run_dir / OWNER_FILE)
            begun.set()
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks on this file system")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)


def test_a_living_owner_on_this_machine_is_named(tmp_path: Path) -> None:
    with (
        holder(tmp_path, SLURM_JOB_ID="41") as process,
        pytest.raises(RunDirectoryInUse, match=f"process {process.pid} on .*, SLURM job 41"),
    ):
        RunLock(tmp_path)


def test_a_killed_owner_leaves_the_directory_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert read_owner(tmp_path)["process"] == process.pid

        def no_waiting(run_dir: Path, owner: dict) -> bool:
            raise AssertionError("watched an owner whose lock the kernel had dropped")

        monkeypatch.setattr(lock, "_moves", no_waiting)
        RunLock(tmp_path).close()
    assert read_owner(tmp_path) == {}


@pytest.mark.parametrize("locks", [True, False])
def test_a_heartbeat_from_another_machine_keeps_us_out_though_its_lock_does_not(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        without_locks(monkeypatch)
    with monkeypatch.context() as patient, beating(tmp_path):
        # A busy machine may keep the other from its beat for longer than three short ones.
        patient.setattr(lock, "BEAT_SECONDS", 3.0)
        with pytest.raises(RunDirectoryInUse, match="process 7 on another, SLURM job 40"):
            RunLock(tmp_path)
    # It stopped: the name alone keeps nobody out.
    assert read_owner(tmp_path)["host"] == "another"
    ours = RunLock(tmp_path)
    assert read_owner(tmp_path)["process"] == os.getpid()
    ours.close()


def test_a_requeued_job_takes_its_directory_back_and_what_is_left_of_its_earlier_life_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path, SLURM_JOB_ID="41", SLURM_RESTART_COUNT="9") as process:
        monkeypatch.setenv("SLURM_JOB_ID", "41")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "10")
        ours = RunLock(tmp_path)
        assert process.wait(30) == RunDirectoryInUse.exit_code
        assert process.stderr is not None and "taken over" in process.stderr.read()
        ours.close()


@pytest.mark.parametrize("job, restart", [("41", "9"), ("41", "10"), ("42", "11"), ("", "11")])
def test_nobody_else_takes_a_directory_from_a_living_owner(
    tmp_path: Path, job: str, restart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path, SLURM_JOB_ID="41", SLURM_RESTART_COUNT="10") as process:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        with pytest.raises(RunDirectoryInUse):
            RunLock(tmp_path)
        assert process.poll() is None


def test_the_owner_is_heard_of_again_and_again_until_it_lets_go(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    first = read_owner(tmp_path)["beat"]
    _until(lambda: read_owner(tmp_path)["beat"] > first + 1)
    held.close()
    assert read_owner(tmp_path) == {} and lock.heartbeat_age(tmp_path) is None


def _until(what: Callable[[], bool]) -> None:
    for _ in range(300):
        if what():
            return
        threading.Event().wait(0.05)
    raise AssertionError("waited 15 s in vain")
