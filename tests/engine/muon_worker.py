"""Steps with Muon under each ZeRO stage, one of them refused; saves every rank's fragments for the test to join."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kha_train import compose, distributed, open_stream
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.train.layer_statistics import UPDATE_NORM, LayerSquares
from kha_train.train.step import next_batch, train_step

torch.set_num_threads(1)
STEPS = 4


def state(engine: Engine) -> dict[tuple[str, str, int], Tensor]:
    """A copy of masters and states, by name, kind and start."""
    return {(f.name, kind, f.start): view.clone() for f in engine.fragments() for kind, view in f.views.items()}


def run_case(overrides: list[str], world: World) -> tuple[dict[str, Any], dict[tuple[str, str, int], Tensor]]:
    """Train, refuse a step, and tell."""
    config = compose(overrides)
    engine, stream = Engine(config, world), open_stream(config, world.rank, world.size)
    answer: dict[str, Any] = {"loss": [], "norm": []}
    for _ in range(STEPS):
        batch, labels = next_batch(stream, world)
        result = train_step(engine, batch, labels, config.optim.lr)
        answer["loss"].append(result.loss)
        answer["norm"].append(result.grad_norm)
    kept = state(engine)
    batch, labels = next_batch(stream, world)
    for apply in (False, True):
        for number, part in enumerate(parts := list(batch.micro_batches(2)), start=1):
            engine.accumulate(part, world.size / labels, 0.0, last=number == len(parts))
        groups = engine.gradient_norms()
        answer["norms"] = [sorted(groups), sum(norm**2 for norm in groups.values()) ** 0.5, float(engine.gradient_norm)]
        if apply:
            squares = LayerSquares(engine)
            engine.apply(config.optim.lr, changed=squares.add)
            answer["updates"] = [float(value) for value in world.sum_(squares.values(UPDATE_NORM)[UPDATE_NORM.name])]
        else:
            engine.discard()
            answer["left by a refused step"] = [
                name for name, value in state(engine).items() if not torch.equal(value, kept[name])
            ]
    found = state(engine)
    engine.close()
    return answer, found


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])["cases"]
    world = distributed.start("cpu", 60.0)
    ran = {name: run_case(overrides, world) for name, overrides in cases.items()}
    distributed.stop()
    torch.save({name: found for name, (_, found) in ran.items()}, f"{sys.argv[2]}.pt")
    answers = {name: answer | {"state": f"{sys.argv[2]}.pt"} for name, (answer, _) in ran.items()}
    Path(sys.argv[2]).write_text(json.dumps(answers))
