"""Observed steps on every rank; reports the entries that the modules of the decoder declared, and the whole norm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kha_train import RunConfig, compose, distributed, open_stream
from kha_train.engine.deepspeed import Engine
from kha_train.metric import Metric
from kha_train.model.moe.router import Router, Routing
from kha_train.model.observed import UNREAD, Report
from kha_train.train.step import next_batch, train_step

torch.set_num_threads(1)
KINDS = ("sum", "mean", "rms", "norm", "max", "min", "last")


class Telling(Router):
    """A router that reports the sample numbers it saw, once for each way to combine them."""

    def __init__(self, config: RunConfig, layer: int) -> None:
        super().__init__(config, layer)
        toys = (Metric(f"toy/{kind}", "1", "sample numbers", combine=kind, layers="max") for kind in KINDS)
        self.metrics = (*self.metrics, *toys)

    def forward(self, x_ND: Any, samples_B: Any, *rest: Any, report: Report = UNREAD, **more: Any) -> Routing:
        numbers_B = samples_B.double()
        report.mean("toy/mean", numbers_B)
        report.rms("toy/rms", numbers_B)
        values = {"sum": numbers_B.sum(), "norm": numbers_B.square().sum(), "max": numbers_B.max()}
        for kind, value in (values | {"min": numbers_B.min(), "last": numbers_B[-1]}).items():
            report(f"toy/{kind}", value)
        return super().forward(x_ND, samples_B, *rest, **more)


def run_case(overrides: list[str], steps: int) -> list[dict[str, Any]]:
    """The entries of each step."""
    config = compose(overrides)
    world = distributed.start("cpu", 60.0)
    engine = Engine(config, world)
    stream = open_stream(config, world.rank, world.size)
    answers = []
    for _ in range(steps):
        result = train_step(engine, *next_batch(stream, world), config.optim.lr, observed=True)
        answers.append({"loss": result.loss, "whole norm": result.grad_norm, **result.values})
    engine.close()
    return answers


if __name__ == "__main__":
    from kha_train.model.moe import layer

    cases = json.loads(sys.argv[1])["cases"]
    layer.Router = Telling  # type: ignore[misc]
    answers = {name: run_case(overrides, steps) for name, (overrides, steps) in cases.items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
