"""`python -m kha_train` with a pause before every step, so that a test can break a run while it trains.

torchrun starts its workers with the program named by PYTHON_EXEC: `slow_python` beside it, which calls this. The pauses
of PAUSE seconds end when the file RELEASE is there: however loaded the machine is, the run does not run out of steps.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from kha_train.cli.main import run
from kha_train.train import run as loop

next_batch = loop.next_batch


def after_a_pause(*arguments: Any) -> Any:
    """The next batch, later."""
    if not Path(os.environ["RELEASE"]).exists():
        time.sleep(float(os.environ["PAUSE"]))
    return next_batch(*arguments)


if __name__ == "__main__":
    import sys

    loop.next_batch = after_a_pause
    run(["train", *sys.argv[1:]])
