"""One step in which rank 0 has all the tokens and every other rank only padding; reports the result of the step."""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kha_train import compose, distributed, open_stream
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.train.step import train_step

torch.set_num_threads(1)


def padding(like: Batch) -> Batch:
    """As many rows as `like`, which hold no token, as they fill up a validation."""
    rows, width = like.rows_BW.shape
    ends = np.arange(rows + 1) * (width - 1)
    layout = Layout(ends, np.arange(ends[-1]), np.zeros(rows, dtype=np.int64))
    return Batch(np.full(rows, -1), np.zeros_like(like.rows_BW), layout)


def run_case(overrides: list[str], world: World) -> dict[str, Any]:
    """Two steps and the loss of a validation after them."""
    config = compose(overrides)
    engine = Engine(config, world)
    stream, steps = open_stream(compose([*overrides, "data.global_batch_size=4"])), []
    for _ in range(2):
        whole = next(stream)
        batch = whole if world.is_main else padding(whole)
        batch.step_tokens = whole.token_count
        result = train_step(engine, batch, whole.label_count, config.optim.lr)
        steps.append([value.tolist() if isinstance(value, torch.Tensor) else value for value in astuple(result)[:8]])
    validated = world.sum_(engine.evaluate(next(batch.micro_batches(2))).loss_sum.double().view(1))
    engine.close()
    return {
        "steps": steps,
        "validated": validated.item(),
        "tokens": batch.step_tokens,
        "places": whole.tokens_BT.numel(),
    }


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])["cases"]
    world = distributed.start("cpu", 60.0)
    answers = {name: run_case(overrides, world) for name, overrides in cases.items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
