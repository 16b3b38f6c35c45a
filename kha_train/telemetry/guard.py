"""Keeps the errors of a mirror away from the run."""

from __future__ import annotations

import re
from typing import Self


class Guard:
    """Swallows any error of the block and keeps its text: no error of a mirror is worth ending a run.

    The libraries of mirrors document no complete list of their exceptions, so a narrower rule would not keep this
    promise. KeyboardInterrupt and SystemExit pass.
    """

    reason = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, Exception):
            text = str(error)
            # A second line from wandb says what the server answered, and which of its settings is wrong.
            cause = re.search(r"while retrying: (.*)|validation errors? for .*\n([\s\S]*?)(?: \[type|$)", text)
            first = text.splitlines()[0] if text else "no message"
            more = " ".join((cause[1] or cause[2] or "").split()) if cause else ""
            self.reason = f"{type(error).__name__}: {first}" + (f" ({more})" if more else "")
            return True
        return False
