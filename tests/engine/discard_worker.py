"""A finite step refused by the gate, against a run that never saw its batch; reports the differences (none)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kha_train import compose, distributed, open_stream
from kha_train.data.stream import Batch
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.train.step import next_batch, train_step

torch.set_num_threads(1)
BATCHES, REFUSED = 5, 2


def state(engine: Engine) -> dict[str, Tensor]:
    """A copy of everything that a step changes: masters, moments, selection biases, step counter."""
    fragments = {f"{f.name} {kind}": view.clone() for f in engine.fragments() for kind, view in f.views.items()}
    biases = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    return {**fragments, **biases, "steps": torch.tensor(engine.optimizer_steps)}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def refuse(engine: Engine, batch: Batch, labels: int, loss_scale: float) -> float:
    """Accumulate the step of `batch` and discard it; its gradient norm."""
    parts = list(batch.micro_batches(engine.config.engine.micro_batch_size))
    for number, part in enumerate(parts, start=1):
        engine.accumulate(part, loss_scale * engine.world.size / labels, 0.0, last=number == len(parts))
    norm = engine.gradient_norm.item()
    engine.discard()
    return norm


def run_case(overrides: list[str], world: World, loss_scale: float) -> dict[str, Any]:
    """One run refuses a batch, its twin never sees it."""
    config = compose(overrides)
    stream = open_stream(config, world.rank, world.size)
    batches = [next_batch(stream, world) for _ in range(BATCHES)]
    answer: dict[str, Any] = {}
    ends = []
    for sees_it in (True, False):
        engine = Engine(config, world)
        losses = []
        for number, (batch, labels) in enumerate(batches):
            if number != REFUSED:
                losses.append(train_step(engine, batch, labels, config.optim.lr).loss)
            elif sees_it:
                before = state(engine)
                answer["norm"] = refuse(engine, batch, labels, loss_scale)
                answer["changed by the refused step"] = differing(before, state(engine))
        ends.append((losses, state(engine)))
        engine.close()
    answer["losses equal"] = ends[0][0] == ends[1][0]
    answer["end states differ in"] = differing(ends[0][1], ends[1][1])
    answer["training moved"] = bool(differing(before, ends[0][1]))
    return answer


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    world = distributed.start("cpu", 60.0)
    answers = {name: run_case(overrides, world, scale) for name, (overrides, scale) in arguments["cases"].items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
