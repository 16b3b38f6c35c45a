"""Reads a checkpoint under one ZeRO stage and world size and writes it again; answers what each rank read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kha_train import compose, distributed
from kha_train.checkpoint import reader
from kha_train.checkpoint.writer import write
from kha_train.engine.deepspeed import Engine
from kha_train.train import resume

torch.set_num_threads(1)


def hand_over(source: Path, target: Path, overrides: list[str]) -> dict[str, Any]:
    """Restore the checkpoint in `source`, write it to `target`; bytes read, elements owned, largest broadcast."""
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

    largest, all_reduce = [0], torch.distributed.all_reduce

    def measured(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        largest.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **options)

    names = ("all_reduce", "broadcast", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor")
    refused = {name: getattr(torch.distributed, name) for name in names[2:]}
    torch.distributed.all_reduce = measured
    for name in refused:
        setattr(torch.distributed, name, lambda *given, **_: sys.exit("a gather during a save"))
    broadcast = torch.distributed.broadcast
    torch.distributed.broadcast = lambda tensor, *given: (largest.append(tensor.nbytes), broadcast(tensor, *given))
    state = {"progress": progress.to_plain(), "optimizer_steps": engine.optimizer_steps}
    write(target, checkpoint.step, world, resume.pieces(engine), engine.buffers(), state)
    engine.close()
    torch.distributed.all_reduce, torch.distributed.broadcast = all_reduce, broadcast
    for name, function in refused.items():
        setattr(torch.distributed, name, function)
    distributed.stop()
    return {"read": sum(read), "owned": owned, "largest": max(largest)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    answer = hand_over(Path(given["source"]), Path(given["target"]), given["overrides"])
    Path(sys.argv[2]).write_text(json.dumps(answer))
