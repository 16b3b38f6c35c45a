"""`kha doctor`: what this machine can run, what it would use, and what is in the way.

Each module of this package looks at one side of the machine and returns lines (`checks.py`). What computes an operation
is not decided here: `device.py` asks `config/resolve.py`, which the trainer asks too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.operate.doctor import device, machine, services, versions
from kha_train.operate.doctor.checks import Check


def examine(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """The lines about this machine as the place where `config` would be trained, one topic after the other."""
    # W&B's own start changes some variables, so the environment is read first.
    given = dict(environ)
    yield from versions.check_versions()
    yield from device.check_device(config)
    yield from machine.check_storage(config)
    yield from machine.check_limits(config)
    yield from machine.check_slurm(given)
    yield from services.check_environment(given)
    yield from services.check_wandb(config)
