"""Starts the ranks of a run on this machine, as torchrun does, and ends with their exit code.

torchrun turns every failure of a rank into exit code 1 and a traceback of its own, which hides what the rank said. Here
a rank that ends by itself has said why, and its exit code is the launcher's. Only a rank that was killed has a line.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from kha_train.literal import say


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run Python with `command` (`["-m", "kha_train", ...]`) as `ranks` processes of one group; the exit code of the
    rank that failed first, or 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # One thread a rank, unless the user says otherwise; torchrun would do the same with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(["--standalone", f"--nproc-per-node={ranks}", *command])
    except SignalException as stopped:
        # The ranks were asked to stop too, and have saved.
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        say(f"rank {rank} was killed by {name}; the same command continues from the newest checkpoint", err=True)
        # As a shell reports it.
        return 128 - int(failure.exitcode)
    return 0
