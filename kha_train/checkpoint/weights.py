"""Writes a checkpoint that holds weights alone, piece by piece: for weights that no run of ours trained.

It is a checkpoint like any other, of the only kind `master`: `run.init_from`, evaluation and generation take it. A run
cannot be resumed or branched from it, because there are no moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from kha_train.checkpoint.manifest import Kinds
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.trainer_state import encode_state
from kha_train.checkpoint.writer import PART_BYTES, Save
from kha_train.distributed import World
from kha_train.variants.optimizer import MASTER


def write_weights(
    run_dir: Path,
    config: dict[str, Any],
    pieces: Iterable[Piece],
    buffers: dict[str, Tensor],
    part_bytes: int = PART_BYTES,
) -> Path:
    """Write `pieces` of masters and `buffers` as the checkpoint of step 0 of `run_dir`, whose configuration is `config`
    in plain values. Returns its directory.

    At most `part_bytes` of pieces are in memory at a time, and one piece more. Raises OSError, and CheckpointError for
    pieces that do not cover every parameter exactly once.
    """
    start = {"step": 0, "samples_seen": 0, "tokens": 0, "skipped_steps": 0, "skip_windows": []}
    state = encode_state({"progress": start, "stability": {}, "optimizer_steps": 0, "config": config})
    save = Save(run_dir, 0, World.single(), state, kinds=Kinds((MASTER,)), part_bytes=part_bytes)
    try:
        save.prepare()
        save.write_share(pieces, buffers)
        save.publish()
    finally:
        save.clear()
    return save.path
