"""Reads a checkpoint under one ZeRO stage and world size and writes it again; reports what each rank read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kha_train import compose, distributed
from kha_train.checkpoint import reader
from kha_train.engine.deepspeed import Engine
from kha_train.train import resume
from kha_train.train.saving import Saver

GATHERS = ("all_gather", "all_gather_into_tensor", "isend", "reduce", "reduce_scatter_tensor")

torch.set_num_threads(1)


def hand_over(source: Path, target: Path, overrides: list[str]) -> dict[str, Any]:
    """Restore the checkpoint in `source`, save it to `target` as a run does; bytes read, elements owned, and the bytes
    of the largest tensor that any collective of the save took."""
    world = distributed.start("cpu", 60.0)
    read, original = [], reader._read_slice

    def counted(*arguments: Any) -> torch.Tensor:
        values = original(*arguments)
        read.append(values.nbytes)
        return values

    reader._read_slice = counted
    checkpoint = reader.find_newest(source, world, lambda text: sys.exit(text))
    read.clear()
    engine = Engine(compose(overrides), world, resume.resumed(checkpoint))
    progress = resume.restore(engine, checkpoint)
    owned = sum(view.numel() for fragment in engine.fragments() for view in fragment.views.values())

    largest = [0]

    def measured(name: str) -> None:
        original = getattr(torch.distributed, name)

        def collective(*arguments: Any, **options: Any) -> Any:
            tensors = [one for one in [*arguments, *options.values()] if isinstance(one, torch.Tensor)]
            largest.append(max(tensor.nbytes for tensor in tensors))
            return original(*arguments, **options)

        setattr(torch.distributed, name, collective)

    for name in ("all_reduce", "broadcast", *GATHERS):
        measured(name)
    state = {"progress": progress.to_plain(), "optimizer_steps": engine.optimizer_steps}
    saver = Saver(engine.config, world, target, sync=lambda: None, event=lambda *given, **_: None)
    saver.begin(checkpoint.step, engine, state)
    saver.finish()
    assert world.size == 1 or len(largest) > 4, "the collectives of a save were seen"
    engine.close()
    distributed.stop()
    return {"read": sum(read), "owned": owned, "largest": max(largest)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    answer = hand_over(Path(given["source"]), Path(given["target"]), given["overrides"])
    Path(sys.argv[2]).write_text(json.dumps(answer))
