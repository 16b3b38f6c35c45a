"""What a rank leaves behind that dies of an exception: one file, to tell the first to fail from its victims."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

from kha_train.distributed import World
from kha_train.errors import KhaError, RunDirectoryInUse
from kha_train.record import Redactor, mark_fatal
from kha_train.record.failures import FAILURES

LIFE_FILE = "life"


class FailureFile:
    """While entered, an exception that passes through is written to `<run_dir>/errors/rank-RRRRR.json`.

    When one rank dies, the others fail too, of its silence: `record.first_failure` finds the one that began. An error
    that would come back and that other ranks do not know of marks the run FATAL, whichever rank it is.
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
        content = {"rank": self._world.rank, "time": time.time(), "error": line, "traceback": text}
        folder = self._run_dir / FAILURES
        with contextlib.suppress(OSError):
            # A rank that dies late must not be taken for one of the start that came after it.
            if (folder / LIFE_FILE).read_text(encoding="utf-8") != self._world.life:
                return
            (folder / f"rank-{self._world.rank:05d}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
            if isinstance(error, KhaError) and error.fatal and not error.agreed:
                mark_fatal(self._run_dir, line)


def forget_failures(run_dir: Path, life: str) -> None:
    """Remove what earlier starts left; from here on the ranks of the start named `life` may write. Raises OSError."""
    folder = run_dir / FAILURES
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("rank-*.json"):
        leftover.unlink()
    (folder / LIFE_FILE).write_text(life, encoding="utf-8")
