"""One owner per run directory: on one machine, across machines without common locks, and after a requeue."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kha_train.errors import RunDirectoryInUse
from kha_train.record import lock, read_owner
from kha_train.record.lock import OWNER_FILE, RunLock

HOLDER = """
import sys; from pathlib import Path; import kha_train.record.lock as lock
lock.BEAT_SECONDS = 0.1
exec(sys.argv[2])
held = lock.RunLock(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""
ELSEWHERE = {"token": "theirs", "process": 7, "host": "another", "job": "40", "restart": "0", "beat": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def holder(
    run_dir: Path, before: Sequence[str] = (), locks: str = "", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `run_dir`, started by the command `before`; `locks` is a statement of its own."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLDER, str(run_dir), locks],
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
def beating(run_dir: Path, owner: dict[str, Any] = ELSEWHERE) -> Iterator[None]:
    """An owner on another machine, alive, of which no lock tells."""
    begun, stop = threading.Event(), threading.Event()

    def beat() -> None:
        for number in itertools.count():
            beside = run_dir / "beside"
            beside.write_text(json.dumps({**owner, "beat": number}))
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


OURS = {"host": socket.gethostname(), **lock._place()}
OTHER_PLACES = {
    "another machine of the same name": {"boot": "another-boot"},
    "another container of this host": {"pids": "pid:[1]"},
    "an owner of an earlier release": {"boot": None, "pids": None},
    "a system that does not tell": {"boot": "", "pids": ""},
}


@pytest.mark.parametrize("case", OTHER_PLACES)
def test_a_heartbeat_from_another_place_of_the_same_host_name_and_process_keeps_us_out(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {**ELSEWHERE, "process": os.getpid(), **OURS, **OTHER_PLACES[case]}
    if "" in told.values():
        monkeypatch.setattr(lock, "_place", lambda: {"boot": "", "pids": ""})
    owner = {key: value for key, value in told.items() if value is not None}
    with monkeypatch.context() as patient, beating(tmp_path, owner):
        patient.setattr(lock, "BEAT_SECONDS", 3.0)
        with pytest.raises(RunDirectoryInUse, match=f"process {os.getpid()} on {OURS['host']}"):
            RunLock(tmp_path)
    RunLock(tmp_path).close()


def test_an_owner_that_finds_the_name_of_its_own_process_number_elsewhere_ends(tmp_path: Path) -> None:
    """Two containers: both trainers are process 1 on a host of the same name."""
    with holder(tmp_path) as process:
        taker = {**read_owner(tmp_path), "token": "theirs", "pids": "pid:[1]"}
        (tmp_path / "theirs").write_text(json.dumps(taker))
        os.replace(tmp_path / "theirs", tmp_path / OWNER_FILE)
        assert process.wait(30) == RunDirectoryInUse.exit_code


def test_a_trainer_in_another_pid_namespace_is_believed_where_locks_end_at_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = ["unshare", "--pid", "--fork", "--kill-child=KILL"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a PID namespace is not permitted here")
    monkeypatch.setattr(lock.fcntl, "lockf", lambda descriptor, operation: None)
    with holder(tmp_path, before=apart, locks="lock.fcntl.lockf = lambda *_: None"):
        assert read_owner(tmp_path)["host"] == socket.gethostname()
        monkeypatch.setattr(lock, "BEAT_SECONDS", 3.0)
        with pytest.raises(RunDirectoryInUse):
            RunLock(tmp_path)


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


def test_an_owner_that_was_suspended_while_another_took_over_ends_before_it_writes(tmp_path: Path) -> None:
    """Its beating thread may come too late: here it does not beat at all."""
    program = (
        "lock.BEAT_SECONDS = 1000.0",
        "record = Record.open(Path(sys.argv[1]))",
        "record.begin_attempt(0)",
        "print('held', flush=True)",
        "sys.stdin.readline()",
        "lock.BEAT_SECONDS = 0.0",
        "record.step({'step': 1})",
    )
    imports = "import sys; from pathlib import Path; from kha_train.record import Record, lock"
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join([imports, *program]), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    (tmp_path / OWNER_FILE).write_text(json.dumps(ELSEWHERE))
    _, complaint = process.communicate("go on\n", timeout=60)
    assert process.returncode == RunDirectoryInUse.exit_code, complaint
    assert "was taken over by SLURM job 40 on another" in complaint
    assert (tmp_path / "metrics.jsonl").read_text() == ""


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
