"""Detects that a run's checkpoints are gone, so that the run does not silently start over."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from kha_train.checkpoint import layout
from kha_train.config.compose import quoted
from kha_train.errors import CheckpointError, First, Settings, either
from kha_train.record import read_events


def check_not_lost(run_dir: Path) -> None:
    """Raises CheckpointError when the events say that `run_dir` has saved a checkpoint, but none can be found.

    The fix in the error starts the run over. Also raises when `checkpoints` is a file or a dangling link, which would
    block every save. Raises DataError when the events are damaged, OSError when the disk fails.
    """
    problem = lost_checkpoints(run_dir)
    if problem:
        aside = f"mv {shlex.quote(str(run_dir))} {shlex.quote(str(free_name(run_dir, 'before')))}"
        raise CheckpointError(
            f"{problem}; a run does not start over unless asked",
            field="run.dir",
            value=str(run_dir),
            fix=either(
                f"mount or restore {run_dir / layout.FOLDER}",
                First(aside),
                Settings(shlex.quote(f"run.dir={quoted(str(free_name(run_dir, 'new')))}")),
            ),
        )


def lost_checkpoints(run_dir: Path) -> str:
    """What happened to the checkpoints that the run has saved; empty while one exists, or before the first save.

    Raises DataError when the events are damaged, OSError when the disk fails.
    """
    folder = run_dir / layout.FOLDER
    try:
        if layout.candidates(folder):
            return ""
        where = _why_empty(folder)
    except PermissionError as error:
        where = f"cannot be read ({error.strerror})"
    saved = newest_saved(run_dir)
    if saved is not None:
        return f"it has saved checkpoints, the last one at step {saved}, but {folder} {where}"
    is_blocked = os.path.lexists(folder) and not folder.is_dir()
    return f"{folder} {where}" if is_blocked or _links_away(folder) else ""


def newest_saved(run_dir: Path) -> int | None:
    """The step of the last checkpoint in the events since the run last began at its first step; None without any.

    An attempt that begins at the first step uses no checkpoint, so earlier ones are not missed.
    """
    newest = None
    for event in read_events(run_dir):
        if event["kind"] == "attempt_started" and event["step"] == 0:
            newest = None
        elif event["kind"] == "checkpoint_saved":
            newest = event["step"]
    return newest


def _why_empty(folder: Path) -> str:
    """Why `folder` has no checkpoint. Raises OSError."""
    if folder.is_symlink() and not folder.exists():
        return f"is a link to {os.readlink(folder)}, which does not exist"
    if not os.path.lexists(folder):
        return "is missing"
    if not folder.is_dir():
        return "is not a directory"
    if away := _links_away(folder):
        return f"holds only dangling links, such as {away[0]} to {os.readlink(folder / away[0])}"
    aside = sorted(name for name in os.listdir(folder) if ".corrupt" in name)
    return f"holds only damaged ones, set aside as {', '.join(aside)}" if aside else "holds none"


def _links_away(folder: Path) -> list[str]:
    """The names of checkpoints in `folder` that are links to an unreachable place. Raises OSError."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    paths = [folder / name for name in names if layout.step_of(name) is not None]
    return [path.name for path in paths if path.is_symlink() and layout.is_away(path)]


def free_name(run_dir: Path, word: str) -> Path:
    """An unused name beside `run_dir` that ends in `word`."""
    name, number = run_dir.with_name(f"{run_dir.name}.{word}"), 1
    while os.path.lexists(name):
        number += 1
        name = run_dir.with_name(f"{run_dir.name}.{word}-{number}")
    return name
