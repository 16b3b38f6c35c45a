"""Engines that begin with a checkpoint, under stages, precisions and groups; reports what happened to its values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kha_train import build_decoder, compose, distributed, open_stream
from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.engine.deepspeed import Engine
from kha_train.train import resume

torch.set_num_threads(1)


def compared(engine: Engine, checkpoint: Checkpoint) -> dict[str, Any]:
    """Elements of this rank whose master is not the checkpoint's, elements whose moment is not zero, and the names of
    parameters that the checkpoint lacks."""
    changed, moved, new = 0, 0, set()
    for fragment in engine.fragments():
        master = fragment.views["master"]
        moved += sum(int(view.count_nonzero()) for kind, view in fragment.views.items() if kind != "master")
        if fragment.name not in checkpoint.names():
            new.add(fragment.name)
            continue
        saved = checkpoint.read(fragment.name, "master", fragment.start, len(master))
        changed += int((master != saved).sum())
    return {"changed": changed, "moved": moved, "new": sorted(new)}


def run_case(source: Path, overrides: list[str], resumes: bool) -> dict[str, Any]:
    """Begin with the checkpoint; its values, and the loss of the first batch beside that of a plain decoder whose
    weights are its masters, rounded."""
    world, config = distributed.start("cpu", 60.0), compose(overrides)
    checkpoint = find_newest(source, world, lambda text: sys.exit(text))
    if resumes:
        engine = Engine(config, world, resume.resumed(checkpoint))
        resume.restore(engine, checkpoint)
    else:
        inherited = resume.Inherited(config, checkpoint)
        engine = Engine(config, world, inherited)
        inherited.fill(engine)
    answer = compared(engine, checkpoint)
    plain, shapes, buffers = build_decoder(config).to(engine.dtype), checkpoint.names(), checkpoint.buffers()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in shapes:
                parameter.copy_(checkpoint.read(name, "master").view(shapes[name]))
        for name, buffer in plain.named_buffers():
            buffer.copy_(buffers.get(name, buffer))
    batch = next(open_stream(config, world.rank, world.size))
    output = plain(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
    answer["losses"] = [engine.evaluate(batch).loss_sum.item(), output.loss_sum.item()]
    engine.close()
    return answer


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    source = Path(given["source"])
    answers = {name: run_case(source, *case) for name, case in given["cases"].items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
