"""Marker files of a run directory, through which a run, its user and its scheduler communicate."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from enum import Enum
from pathlib import Path

from kha_train.foreign.files import SMALL, read_regular
from kha_train.record.files import sync_directory
from kha_train.record.redact import Redactor


class Marker(Enum):
    """DONE: all steps are trained. REQUEUE: stopped in good order and saved; start it again. FATAL: do not start it
    again without looking. STOP: written by a user; the run saves and stops after the current step, or within a long
    one.
    """

    DONE = "DONE"
    REQUEUE = "REQUEUE"
    FATAL = "FATAL"
    STOP = "STOP"


def set_marker(run_dir: Path, marker: Marker, text: str = "") -> None:
    """Creates the marker durably; `text` is its content, for people to read."""
    path = run_dir / marker.value
    if os.path.lexists(path) and not path.is_file():
        clear_marker(run_dir, marker)
    clean = Redactor.from_environment().text(text)
    path.write_text(f"{clean}\n" if text else "", encoding="utf-8", errors="backslashreplace")
    sync_directory(run_dir)


def mark_fatal(run_dir: Path, text: str) -> None:
    """Sets FATAL, unless the run is DONE or REQUEUE. An attempt that begins removes these two, so they exist only if no
    attempt began, and a run that ended in good order keeps its marker.
    """
    if not (has_marker(run_dir, Marker.DONE) or has_marker(run_dir, Marker.REQUEUE)):
        set_marker(run_dir, Marker.FATAL, text)


def read_marker(run_dir: Path, marker: Marker) -> str:
    """The text of the marker; empty without one. Raises DataError when it is larger than any marker."""
    if not has_marker(run_dir, marker) or not (run_dir / marker.value).is_file():
        return ""
    return (read_regular(run_dir / marker.value, SMALL) or b"").decode(errors="replace").strip()


def has_marker(run_dir: Path, marker: Marker) -> bool:
    """Whether the marker file exists. For STOP anything of that name counts; the others must be files."""
    path = run_dir / marker.value
    return path.exists() if marker is Marker.STOP else path.is_file()


def clear_marker(run_dir: Path, marker: Marker) -> None:
    """Removes the marker if it exists. A non-empty directory of its name is moved aside."""
    clear_path(run_dir / marker.value)


def clear_path(path: Path) -> None:
    """Removes the file `path` if it exists. A non-empty directory of its name is moved aside."""
    if path.is_dir() and not path.is_symlink():
        aside = _move_aside(path)
        with suppress(OSError):
            aside.rmdir()
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes the directory `path` and its parents. Anything else with one of these names is moved aside."""
    if os.path.lexists(path) and not path.is_dir():
        _move_aside(path)
    path.mkdir(parents=True, exist_ok=True)


def _move_aside(path: Path) -> Path:
    """Renames `path` to an unused name that matches no pattern of our files, such as `rank-*.json`."""
    aside = path.with_name(f"aside-{path.name}.{secrets.token_hex(4)}")
    path.rename(aside)
    return aside


def leave_outcome(text: str) -> None:
    """Tells the batch script that started this process the outcome of the attempt.

    `training` once the run directory is its own, then `done`, `requeue`, `stopped`, or an exit code after `fatal` or
    `failed`. Exit codes do not pass through torchrun, and the markers of a run directory may belong to another job.
    Every rank may call this at any time: the file always holds one complete outcome, and keeps the previous one where
    it cannot be written.
    """
    path = os.environ.get("KHA_OUTCOME_FILE")
    if path:
        beside = Path(f"{path}.{socket.gethostname()}.{os.getpid()}")
        with suppress(OSError):
            beside.write_text(f"{text}\n", encoding="utf-8")
            os.replace(beside, path)
