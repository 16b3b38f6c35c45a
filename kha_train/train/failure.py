"""What a rank leaves behind that dies of an exception: one file, to tell the first to fail from its victims."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kha_train.distributed import World
from kha_train.errors import KhaError

FOLDER = "errors"


class FailureFile:
    """While entered, an exception that passes through is written to `<run_dir>/errors/rank-RRRRR.json`.

    When one rank dies, the others fail too, of its silence: `first_failure` finds the one that began. Files of the
    last attempt are removed on entering.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self._path, self._rank = run_dir / FOLDER / f"rank-{world.rank:05d}.json", world.rank

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        line = error.line() if isinstance(error, KhaError) else f"{type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))
        content = {"rank": self._rank, "time": time.time(), "error": line, "traceback": text}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def first_failure(run_dir: Path) -> dict[str, Any] | None:
    """Of all ranks' failures in the last attempt the earliest: rank, time, error, traceback. None without any."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (run_dir / FOLDER).glob("rank-*.json")]
    return min(found, key=lambda failure: failure["time"], default=None)
