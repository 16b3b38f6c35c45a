"""The file that a failing rank writes, so that the first failure can be told from its consequences."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kha_train.distributed import World
from kha_train.errors import KhaError, RunDirectoryInUse
from kha_train.record import Redactor, leave_outcome, mark_fatal
from kha_train.record.failures import FAILURES, LIFE_FILE, RANKS
from kha_train.record.markers import clear_path, make_folder


class FailureFile:
    """Inside the `with` block, an exception that passes through is written to `<run_dir>/errors/rank-RRRRR.json`.

    When one rank dies, the others fail too, because it no longer answers: `record.blame` finds the first. An error that
    would happen again and that other ranks do not know of marks the run FATAL, whichever rank it is.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._run_dir, self._world = run_dir, world

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit | RunDirectoryInUse):
            return
        clean = Redactor.from_environment().text
        line = clean(error.line() if isinstance(error, KhaError) else f"{type(error).__name__}: {error}")
        text = clean("".join(traceback.format_exception(error)))
        if leave_failure(self._run_dir, self._world, {"error": line, "traceback": text}):
            with contextlib.suppress(OSError):
                if isinstance(error, KhaError) and error.fatal and not error.agreed:
                    mark_fatal(self._run_dir, line)


def leave_failure(run_dir: Path, world: World, told: dict[str, Any]) -> bool:
    """Write this rank's failure. Returns whether it was written; it is not if one exists already, or a later start owns
    the directory.

    `told` has `error` and `traceback` without secrets, and `about` if another rank is to blame.
    """
    folder, content = run_dir / FAILURES, {"rank": world.rank, "time": time.time(), **told}
    with contextlib.suppress(OSError):
        # A rank that fails late must not look like one of the next start.
        if (run_dir / RANKS / LIFE_FILE).read_text(encoding="utf-8") != _name(world):
            return False
        make_folder(folder)
        # The first report is the cause: a hanging rank may lose its connections before it ends.
        with (folder / f"rank-{world.rank:05d}.json").open("x", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        return True
    return False


def accept(run_dir: Path, world: World) -> None:
    """The settings fit the run: from here on its failures belong to this start. Collective.

    Raises MachineError on all ranks if rank 0 cannot write.
    """
    with world.agreed(f"write {run_dir}"):
        if world.is_main:
            forget_failures(run_dir, world)
    if world.is_main:
        leave_outcome("training")


def forget_failures(run_dir: Path, world: World) -> None:
    """Remove the files of earlier starts; from here on the ranks of this start may write. Raises OSError."""
    folder, life = run_dir / FAILURES, run_dir / RANKS / LIFE_FILE
    make_folder(life.parent)
    if folder.is_dir():
        for leftover in (*folder.glob("rank-*.json"), folder / LIFE_FILE):
            clear_path(leftover)
        with contextlib.suppress(OSError):
            folder.rmdir()
    clear_path(life)
    life.write_text(_name(world), encoding="utf-8")


def _name(world: World) -> str:
    return f"{world.life} {world.size}"
