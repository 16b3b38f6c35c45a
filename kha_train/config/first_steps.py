"""Advice for users who have not run `kha quickstart` yet: it makes the data and runs that the documentation uses."""

from __future__ import annotations

import os
from pathlib import Path

from kha_train.errors import First

QUICKSTART = "quickstart"
"""The directory that `kha quickstart` writes here; `configs/data/quickstart.yaml` names its shards."""


def quickstart_first(path: Path | str) -> First | None:
    """`kha quickstart` as a fix if it would make the missing `path`; None where `path` is not part of it, or it has
    run.
    """
    parts = Path(os.path.relpath(path)).parts
    # The directory itself has no parts.
    if parts[:1] != (QUICKSTART,) or Path(*parts[:2]).exists():
        return None
    return First("kha quickstart")
