"""Trains and reports the resources of the process at intervals."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from kha_train import compose
from kha_train.train import run

torch.set_num_threads(1)


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    samples: list[dict[str, Any]] = []
    train_step, steps = run.train_step, itertools.count(1)

    def sampled(*arguments: Any) -> Any:
        """A step, and now and then a look at the process."""
        count = next(steps)
        if count % given["every"] == 0:
            gc.collect()
            files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            samples.append({"step": count, "files": files, "threads": threads, "mib": resident_mib()})
        return train_step(*arguments)

    run.train_step = sampled
    with tempfile.TemporaryDirectory() as folder:
        run.train(compose([*given["overrides"], f"run.dir={folder}/run"]))
    Path(sys.argv[2]).write_text(json.dumps(samples))
