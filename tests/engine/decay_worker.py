"""Steps with separate interaction parameters, each checked against AdamW's formula in fp64; reports the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kha_train import compose, distributed, open_stream
from kha_train.config.schema import RunConfig
from kha_train.engine.deepspeed import Engine
from kha_train.train.step import next_batch, train_step

torch.set_num_threads(1)
STEPS = 3
MIXES = ("maps", "compose", "score_mix", "weight_mix")
"""In the names of the matrices through which heads exchange information."""


def taken_apart(name: str) -> bool:
    """Whether heads exchange information through the parameter, by its name alone."""
    return any(part in MIXES for part in name.split("."))


def target(name: str, shape: tuple[int, ...]) -> Tensor:
    """The papers' values: the identity for every matrix, zero for a gate."""
    return (torch.zeros(shape) if "gate" in name.split(".") else torch.eye(*shape)).flatten().double()


def expected(config: RunConfig, fragment: Any, before: Tensor, lr: float, step: int) -> Tensor:
    """What the master of the fragment is after a step from `before`, by its moments after the step."""
    optim, (first, second) = config.optim, config.optim.betas
    decay = optim.weight_decay if len(fragment.shape) > 1 else 0.0
    aim = torch.zeros_like(before)
    if taken_apart(fragment.name):
        lr *= optim.interaction_lr_scale
        decay = 0.0 if optim.interaction_decay == "none" else decay
        if optim.interaction_decay == "identity":
            aim = target(fragment.name, fragment.shape)[fragment.start : fragment.start + len(before)]
    mean = fragment.views["exp_avg"].double() / (1 - first**step)
    square = fragment.views["exp_avg_sq"].double() / (1 - second**step)
    return before - lr * decay * (before - aim) - lr * mean / (square.sqrt() + optim.eps)


def state(engine: Engine) -> dict[str, Tensor]:
    """A copy of masters and moments, by the fragment's name and kind."""
    return {f"{f.name} {kind}": view.clone() for f in engine.fragments() for kind, view in f.views.items()}


def run_case(overrides: list[str]) -> dict[str, Any]:
    """Steps at growing rates; after them, one that is refused."""
    config, world = compose(overrides), distributed.start("cpu", 60.0)
    engine, stream = Engine(config, world), open_stream(config, world.rank, world.size)
    answer: dict[str, Any] = {"loss": [], "norm": [], "error": 0.0, "moved": 0.0, "seen": []}
    for step in range(1, STEPS + 1):
        lr = config.optim.lr * step / STEPS
        before = {f.name: f.views["master"].double() for f in engine.fragments()}
        batch, labels = next_batch(stream, world)
        result = train_step(engine, batch, labels, lr)
        answer["loss"].append(result.loss)
        answer["norm"].append(result.grad_norm)
        for fragment in engine.fragments():
            after = fragment.views["master"].double()
            error = (after - expected(config, fragment, before[fragment.name], lr, step)).abs().max()
            answer["error"] = max(answer["error"], float(error))
            if taken_apart(fragment.name):
                answer["seen"].append(fragment.name)
                answer["moved"] = max(answer["moved"], float((after - before[fragment.name]).abs().max()))
    kept = state(engine)
    batch, labels = next_batch(stream, world)
    for number, part in enumerate(parts := list(batch.micro_batches(config.engine.micro_batch_size)), start=1):
        engine.accumulate(part, world.size / labels, 0.0, last=number == len(parts))
    groups = sum(norm**2 for norm in engine.gradient_norms().values()) ** 0.5
    answer["norms by layer"] = [sorted(engine.gradient_norms()), groups, engine.gradient_norm.item()]
    engine.discard()
    answer["left by a refused step"] = [
        name for name, value in state(engine).items() if not torch.equal(value, kept[name])
    ]
    answer["seen"] = sorted(set(answer["seen"]))
    engine.close()
    return answer


if __name__ == "__main__":
    answers = {name: run_case(overrides) for name, overrides in json.loads(sys.argv[1])["cases"].items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
