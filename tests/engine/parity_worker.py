"""Steps under each ZeRO stage, on every rank; reports losses, norms, label counts, samples and initial weights."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from kha_train import compose, distributed, open_stream
from kha_train.engine.deepspeed import Engine
from kha_train.train.step import next_batch, train_step

torch.set_num_threads(1)


def whole_weights(engine: Engine) -> dict[str, str]:
    """SHA-256 of every whole fp32 master, put together from the fragments of all ranks."""
    whole = {}
    for name, parameter in engine.decoder.named_parameters():
        whole[name] = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()))
    for fragment in engine.fragments():
        values = fragment.views["master"]
        whole[fragment.name][fragment.start : fragment.start + values.numel()] = values
    summed = {name: engine.world.sum_(values) for name, values in whole.items()}
    return {name: hashlib.sha256(values.numpy().tobytes()).hexdigest() for name, values in summed.items()}


def run_case(overrides: list[str], steps: int) -> dict[str, Any]:
    """Build, train `steps` steps, and tell."""
    config = compose(overrides)
    world = distributed.start("cpu", 60.0)
    engine = Engine(config, world)
    stream = open_stream(config, world.rank, world.size)
    answer: dict[str, Any] = {"initial": whole_weights(engine), "loss": [], "norm": [], "labels": [], "samples": []}
    answer |= {"auxiliary": [], "load": [], "tokens": []}
    for _ in range(steps):
        batch, labels = next_batch(stream, world)
        result = train_step(engine, batch, labels, config.optim.lr)
        assert result.applied
        answer["loss"].append(result.loss)
        answer["norm"].append(result.grad_norm)
        answer["auxiliary"].append([result.balance_loss, result.z_loss])
        answer["load"].append(result.load_LE.tolist())
        answer["tokens"].append(batch.step_tokens)
        answer["labels"].append(batch.label_count)
        answer["samples"].append(batch.samples_B.tolist())
    answer["buffer_dtypes"] = sorted({str(buffer.dtype) for buffer in engine.buffers().values()})
    answer["parameter_dtypes"] = sorted({str(parameter.dtype) for parameter in engine.decoder.parameters()})
    engine.close()
    return answer


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])["cases"]
    answers = {name: run_case(overrides, steps) for name, (overrides, steps) in cases.items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
