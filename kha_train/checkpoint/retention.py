"""Which checkpoints are kept, and how the others go without ever risking the last good one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from kha_train.checkpoint import layout
from kha_train.checkpoint.agreement import Agreed
from kha_train.checkpoint.manifest import Manifest
from kha_train.checkpoint.reader import check_sizes
from kha_train.checkpoint.writer import no_stage
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError


def prune(
    run_dir: Path,
    world: World,
    keep_last: int,
    *,
    protect: Collection[int] = (),
    check: Callable[[Path], Manifest] = check_sizes,
    stage: Callable[[str], None] = no_stage,
) -> list[int]:
    """Delete all but the `keep_last` newest valid checkpoints; returns the steps deleted (rank 0; empty elsewhere).

    Collective; rank 0 does the work. `protect` names steps that stay whatever their age (the resumed-from one,
    permanent ones). `check` raises CheckpointError for an invalid directory: `check_sizes` is right after a save, whose
    bytes were hashed on their way out; `reader.verify` reads every byte. Invalid directories are neither counted nor
    deleted. `stage` is called with "before_prune" and, amid each deletion, "mid_prune": a fault test ends the process
    there. Raises ConfigError when `keep_last` < 1, CheckpointError when a directory cannot be removed.
    """
    if keep_last < 1:
        raise ConfigError("at least one must stay", field="checkpoint.keep_last", value=keep_last, allowed=">= 1")
    deleted: list[int] = []
    with Agreed(world, "prune"):
        if world.rank == 0:
            folder = Path(run_dir) / layout.FOLDER
            surplus = _surplus(folder, keep_last, frozenset(protect), check)
            stage("before_prune")
            for step, directory in surplus:
                layout.remove(directory, step, lambda: stage("mid_prune"))
                deleted.append(step)
            layout.clear_leftovers(folder)
    return deleted


def _surplus(
    folder: Path, keep_last: int, protect: frozenset[int], check: Callable[[Path], Manifest]
) -> list[tuple[int, Path]]:
    """The valid directories that may go, oldest first."""
    kept: set[int] = set()
    newest = 0
    surplus = []
    for step, directory in layout.candidates(folder):
        try:
            check(directory)
        except (CheckpointError, OSError):
            continue
        if step not in kept and (newest < keep_last or step in protect):
            newest += newest < keep_last
            kept.add(step)
        else:
            surplus.append((step, directory))
    return surplus[::-1]
