"""What a run stands on, and whether it has anything left to do, found out before an attempt at it begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from kha_train.checkpoint.loss import check_not_lost, lost_checkpoints
from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.config.compose import load_plain
from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.errors import CheckpointError
from kha_train.record import Marker, has_marker, read_marker, read_metrics
from kha_train.train import resume

NOT_FINISHED = -1


def finished_at(config: RunConfig, run_dir: Path) -> int:
    """The step at which the run was DONE, where `config` asks for no more steps than that; else NOT_FINISHED.

    Raises OSError, and DataError when the record is damaged.
    """
    if not has_marker(run_dir, Marker.DONE):
        return NOT_FINISHED
    said = re.fullmatch(r"step ([0-9]{1,15})", read_marker(run_dir, Marker.DONE))
    lines = [] if said else read_metrics(run_dir)
    step = int(said[1]) if said else lines[-1]["step"] if lines else NOT_FINISHED
    return step if step >= config.run.steps else NOT_FINISHED


def needs_no_checkpoint(config: RunConfig, run_dir: Path, finished: int) -> bool:
    """Whether the run ends at once although no checkpoint of it is left: it `finished`, with these very settings.

    Raises CheckpointError when the checkpoints of any other run are lost.
    """
    if finished == NOT_FINISHED or not lost_checkpoints(run_dir):
        check_not_lost(run_dir)
        return False
    changed = resume.changed_settings(config, load_plain(run_dir / "config.yaml"))
    if resume.not_allowed(config, changed, "run.steps"):
        check_not_lost(run_dir)
    return True


def find_own_checkpoint(run_dir: Path, world: World, report: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the run goes on from, None when it has not saved any yet. Collective.

    Raises CheckpointError when there are some and none verifies, and what `find_newest` raises.
    """
    refused = []

    def count(text: str) -> None:
        refused.append(text)
        report(text)

    checkpoint = find_newest(run_dir, world, count)
    if checkpoint is None and refused:
        raise CheckpointError(
            f"none of its {len(refused)} checkpoints verifies, and a run does not start over unasked",
            field="run.dir",
            value=str(run_dir),
            fix="restore a step directory (they are set aside as .corrupt), or choose another run.dir",
        )
    return checkpoint
