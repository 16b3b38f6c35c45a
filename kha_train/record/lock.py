"""Ensures that one live process owns a run directory.

There are two mechanisms, because neither is enough alone. The kernel releases a POSIX lock on `.lock` when its process
ends, for whatever reason. But some network file systems keep such locks to one machine, or have none. So the owner also
writes its name and a beat into `owner.json` every few seconds. A process that finds the lock free, but an owner from
another place in that file, watches the file for three beats: if the beat changes, the owner is alive. Clocks are never
compared.

A place is one boot of one machine and one PID namespace in it. Host names do not identify a place: containers and
cloned machines share them. All containers of a host share its boot. Only within a place does a free lock prove that the
owner is gone, and only there does a process number identify a process. Owners of earlier releases do not record their
place, so they count as another place.

A requeued SLURM job has the same id and a higher restart count. It takes its directory back at once. An owner that
finds another name in the file has been replaced (its node was cut off, say) and ends at once, so that two processes
never write. An earlier life of the job is refused like any other process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from kha_train.errors import DataError, RunDirectoryInUse
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, check_regular, read_regular
from kha_train.foreign.typed import Source
from kha_train.literal import say
from kha_train.record.schema import Owner

LOCK_FILE = ".lock"
OWNER_FILE = "owner.json"
BEAT_SECONDS = 5.0
PLACE = ("host", "boot", "pids")
"""Keys of an owner that together identify the place where its process runs."""
_TOKENS: set[str] = set()
"""The tokens of all owners that this process has been."""


class RunLock:
    """The ownership of `run_dir` from construction to `close()`.

    Forked children do not inherit the POSIX lock (unlike `flock`), so an orphaned worker of a killed run cannot block
    its successor. Two locks in one process do not exclude each other. Raises RunDirectoryInUse, naming the owner, and
    DataError when `owner.json` names none.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._closed = run_dir, threading.Event()
        self._me: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "process": os.getpid(),
            "host": socket.gethostname(),
            **_place(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        }
        check_regular(run_dir / LOCK_FILE)
        _TOKENS.add(self._me["token"])
        self._confirmed = time.monotonic()
        self._file = (run_dir / LOCK_FILE).open("a")
        try:
            self._take()
        except (RunDirectoryInUse, DataError):
            self._file.close()
            raise
        self._thread = threading.Thread(target=self._beat, name="run directory owner", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Call before writing: if this process was suspended and has been replaced in the meantime, it ends here."""
        if time.monotonic() - self._confirmed > 3 * BEAT_SECONDS:
            with suppress(OSError, DataError):
                self._is_ours()

    def close(self) -> None:
        """Release the directory."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if read_owner(self._run_dir).get("token") == self._me["token"]:
            (self._run_dir / OWNER_FILE).unlink(missing_ok=True)
        self._file.close()

    def _take(self) -> None:
        locked, owner = _try_lock(self._file.fileno()), read_owner(self._run_dir)
        requeued = bool(self._me["job"]) and owner.get("job") == self._me["job"]
        requeued = requeued and int(owner.get("restart", "0")) < int(self._me["restart"])
        if locked is False and not requeued:
            self._refuse(owner)
        here = all(self._me[key] and owner.get(key) == self._me[key] for key in PLACE)
        elsewhere = owner and (locked is None or not here)
        if elsewhere and not requeued and _moves(self._run_dir, owner):
            self._refuse(owner)
        self._write(0)
        # The owner before this restart reads our name at its next beat and ends, which frees the lock.
        deadline = time.monotonic() + 3 * BEAT_SECONDS
        while locked is False and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)
            locked = _try_lock(self._file.fileno())

    def _refuse(self, owner: dict[str, Any]) -> None:
        job = f", SLURM job {owner['job']}" if owner.get("job") else ""
        name = f"process {owner.get('process')} on {owner.get('host')}{job}" if owner else "unknown"
        age = heartbeat_age(self._run_dir)
        heard = "" if age is None else f", heard of {age:.0f} s ago"
        raise RunDirectoryInUse(
            f"another process is training here: {name}{heard}",
            field="run.dir",
            value=str(self._run_dir),
            fix=f"wait for it, stop it (`touch {self._run_dir}/STOP`), or choose another run.dir; the lock of a dead "
            "process is released by itself",
            code="E13",
        )

    def _write(self, beat: int) -> None:
        beside = self._run_dir / f".{OWNER_FILE}.{self._me['token']}"
        beside.write_text(json.dumps({**self._me, "beat": beat}) + "\n", encoding="utf-8")
        os.replace(beside, self._run_dir / OWNER_FILE)

    def _beat(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT_SECONDS):
            beat += 1
            try:
                if not self._is_ours():
                    return
                self._write(beat)
            except FileNotFoundError:
                return
            except (OSError, DataError):
                # The disk is full or unreachable; training itself will report it.
                continue

    def _is_ours(self) -> bool:
        """True while the file names this process, False when this process has replaced itself. Ends the process when
        another process has replaced it. Raises OSError, and DataError where the file does not hold an owner.
        """
        owner = read_owner(self._run_dir)
        self._confirmed = time.monotonic()
        if not owner or owner.get("token") in _TOKENS:
            return not owner or owner["token"] == self._me["token"]
        job = f"SLURM job {owner['job']}" if owner.get("job") else f"process {owner.get('process')}"
        taken = f"{self._run_dir} was taken over by {job} on {owner.get('host')}: ending"
        say(taken, err=True)
        os._exit(RunDirectoryInUse.exit_code)


def _place() -> dict[str, str]:
    """This boot of this machine and this PID namespace; "" where the system does not provide them."""
    boot, pids = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        pids = os.readlink("/proc/self/ns/pid")
    return {"boot": boot, "pids": pids}


def read_owner(run_dir: Path) -> dict[str, Any]:
    """The owner of `run_dir`: `process`, its place (`host`, `boot`, `pids`), `job`, `restart`, `beat`; empty when there
    is none, or it did not write its name.

    Raises DataError when the file is intact but does not hold an owner.
    """
    path = run_dir / OWNER_FILE
    try:
        content = parse_json(read_regular(path, SMALL) or b"")
    except ValueError:
        return {}
    return dict(Source(str(path), fix="remove it if no process is training here").read(Owner, content))


def heartbeat_age(run_dir: Path) -> float | None:
    """Seconds since the last sign of life of the owner of `run_dir`; None when the directory is free."""
    try:
        return max(0.0, time.time() - (run_dir / OWNER_FILE).stat().st_mtime)
    except FileNotFoundError:
        return None


def _try_lock(descriptor: int) -> bool | None:
    """True: this process holds the lock. False: another process holds it. None: this file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _moves(run_dir: Path, owner: dict[str, Any]) -> bool:
    """Whether the owner's beat changes within three beats."""
    deadline = time.monotonic() + 3 * BEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        if read_owner(run_dir) not in (owner, {}):
            return True
    return False
