"""Checks what three ranks learn about each other's values and errors."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kha_train import distributed
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError, DataError, KhaError


def caught(world: World, error: BaseException | None) -> list[Any]:
    """Kind, exit code and message of the error this rank raises; empty when there is none."""
    try:
        world.raise_together(error)
    except KhaError as found:
        return [type(found).__name__, found.exit_code, str(found)]
    except ZeroDivisionError as found:
        return [type(found).__name__, None, str(found)]
    return []


def main(answer_file: Path) -> None:
    """Each line is one agreement of all ranks."""
    world = distributed.start("cpu", 30.0)
    rank = world.rank
    answer = {
        "max": world.max_ints(rank, -rank, 7),
        "sum": world.sum_(torch.tensor([rank + 1, 1])).tolist(),
        "text": world.broadcast_text(f"from {rank}: \u00fc", source=1),
        "empty": world.broadcast_text("" if rank == 1 else "not mine", source=1),
        "nothing": caught(world, None),
        "one": caught(world, DataError("broken shard") if rank == 1 else None),
        "two": caught(world, [None, ConfigError("b"), CheckpointError("c")][rank]),
        "defect": caught(world, ZeroDivisionError("by zero") if rank == 2 else None),
        "machine": caught(world, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if rank == 2 else None),
        "mistake": caught(world, PermissionError(errno.EACCES, os.strerror(errno.EACCES)) if rank == 0 else None),
        "life": world.life,
    }
    try:
        with world.agreed():
            if rank == 0:
                raise DataError("only here")
    except DataError as found:
        answer["agreed"] = str(found)
    absent = replace(world, device=torch.device("cuda"), host_group=torch.distributed.new_group(backend="gloo"))
    answer["by_host_group"] = [absent.broadcast_text(f"from rank {rank}", source=1), *absent.sum_ints(rank)]
    world.barrier()
    distributed.stop()
    answer_file.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
