"""What previous attempts of a run left: whether steps remain, and the checkpoint to continue from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from kha_train.checkpoint import layout
from kha_train.checkpoint.loss import check_not_lost, lost_checkpoints
from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.config.compose import load_plain
from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.errors import CheckpointError, KhaError
from kha_train.record import Marker, has_marker, read_last_metrics, read_marker
from kha_train.record.attempts import CONFIG_FILE
from kha_train.train import resume

NOT_FINISHED = -1


def finished_at(config: RunConfig, run_dir: Path) -> int:
    """The step at which the run was DONE, if `config` needs no more steps than that; else NOT_FINISHED.

    Raises OSError, and DataError when the record is damaged.
    """
    if not has_marker(run_dir, Marker.DONE):
        return NOT_FINISHED
    said = re.fullmatch(r"step ([0-9]{1,15})", read_marker(run_dir, Marker.DONE))
    lines = [] if said else read_last_metrics(run_dir)
    step = int(said[1]) if said else lines[-1]["step"] if lines else NOT_FINISHED
    return step if step >= config.run.steps else NOT_FINISHED


def needs_no_checkpoint(config: RunConfig, run_dir: Path, finished: int) -> bool:
    """Whether the run ends at once although no checkpoint of it is left: it has `finished`, with exactly these
    settings.

    This holds whatever its events say. Raises CheckpointError when the checkpoints of any other run are lost.
    """
    if finished != NOT_FINISHED and _has_same_settings(config, run_dir):
        return bool(lost_checkpoints(run_dir)) or not layout.candidates(run_dir / layout.FOLDER)
    check_not_lost(run_dir)
    return False


def _has_same_settings(config: RunConfig, run_dir: Path) -> bool:
    """Whether the last attempt had the settings of `config`; False if they cannot be read."""
    try:
        saved = load_plain(run_dir / CONFIG_FILE)
    except KhaError:
        return False
    return bool(saved) and not resume.not_allowed(config, resume.changed_settings(config, saved), "run.steps")


def find_own_checkpoint(run_dir: Path, world: World, report: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the run continues from, None if it has not saved any yet. Collective.

    Raises CheckpointError when there are some and none verifies, and what `find_newest` raises.
    """
    refused = []

    def count(text: str) -> None:
        refused.append(text)
        report(text)

    checkpoint = find_newest(run_dir, world, count)
    if checkpoint is None and refused:
        raise CheckpointError(
            f"none of its {len(refused)} checkpoints verifies, and a run does not start over unless asked",
            field="run.dir",
            value=str(run_dir),
            fix="restore a step directory (they are set aside as .corrupt), or choose another run.dir",
        )
    return checkpoint
