"""One rank of the runs that test_stability.py judges; reports their results."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kha_train import compose, distributed, open_stream
from kha_train.data.rows.batch import Batch
from kha_train.data.stream import TokenStream
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.record import Marker, Record, set_marker
from kha_train.stability.events import Observation
from kha_train.train import opening
from kha_train.train.run import train
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling, Watch

torch.set_num_threads(1)
BATCHES, POISONED = 5, 2


def state(engine: Engine) -> dict[str, Tensor]:
    """A copy of everything that a step changes."""
    fragments = {f"{f.name} {kind}": view.clone() for f in engine.fragments() for kind, view in f.views.items()}
    biases = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    return {**fragments, **biases, "steps": torch.tensor(engine.optimizer_steps)}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ."""
    return [name for name in before if not torch.equal(before[name], after[name])]


def poisoned_steps(overrides: list[str], world: World) -> dict[str, Any]:
    """A few steps whose third has a NaN gradient on the last rank alone, beside a twin that never saw its batch."""
    config = compose(overrides)
    stream = open_stream(config, world.rank, world.size)
    batches = [next_batch(stream, world) for _ in range(BATCHES)]
    answer: dict[str, Any] = {}
    ends = []
    for sees_it in (True, False):
        engine, watch, losses = Engine(config, world), Watch(config), []
        accumulate = engine.accumulate

        def poison(batch: Batch, loss_scale: float, *rest: Any, accumulate: Any = accumulate, **more: Any) -> Any:
            return accumulate(batch, math.nan if world.rank == world.size - 1 else loss_scale, *rest, **more)

        for number, (batch, labels) in enumerate(batches):
            poisoned = number == POISONED
            if poisoned and not sees_it:
                continue
            engine.accumulate = poison if poisoned else accumulate
            before = state(engine)

            def judge(loss: float, norm: float, number: int = number, watch: Watch = watch) -> Ruling:
                return watch.judge(Observation(number + 1, loss, norm))

            result = train_step(engine, batch, labels, config.optim.lr, judge)
            if poisoned:
                answer |= {"applied": result.applied, "norm": result.grad_norm, "loss": result.loss}
                answer["changed"] = differing(before, state(engine))
            else:
                losses.append(result.loss)
        ends.append((losses, state(engine)))
        engine.close()
    answer["losses equal"] = ends[0][0] == ends[1][0]
    answer["end states differ in"] = differing(ends[0][1], ends[1][1])
    answer["moved"] = bool(differing(before, ends[1][1]))
    return answer


def probed_steps(overrides: list[str], world: World) -> dict[str, Any]:
    """A few probed steps, beside a twin without probes."""
    config = compose(overrides)
    ends, found, norm = [], {}, 0.0
    for probed in (True, False):
        engine, stream = Engine(config, world), open_stream(config, world.rank, world.size)
        for _ in range(3):
            batch, labels = next_batch(stream, world)
            ruling = Ruling(True, probe=probed)
            result = train_step(engine, batch, labels, 1e-3, lambda loss, norm, ruling=ruling: ruling)
            found, norm = (result.evidence, result.grad_norm) if result.evidence else (found, norm)
        ends.append(state(engine))
        engine.close()
    return {"differ": differing(*ends), "evidence": found, "norm": norm}


def whole_run(overrides: list[str], bad: list[int], skip: list[int], stop_at: int) -> dict[str, Any]:
    """A run over data that is noise in the samples `bad`; over a stream that leaves out `skip`; stopped after step
    `stop_at` (0: never)."""
    config = compose(overrides)
    original_next, original_open, original_step = TokenStream.__next__, opening.open_stream, Record.step

    def damaged(stream: TokenStream) -> Batch:
        batch = original_next(stream)
        rows = np.isin(batch.samples_B, np.arange(*bad)) if bad else np.zeros(0, dtype=bool)
        if rows.any():
            noise = np.random.default_rng(int(batch.samples_B[0]))
            batch.rows_BW[rows] = noise.integers(0, 256, batch.rows_BW[rows].shape)
        return batch

    def opened(*arguments: Any, **more: Any) -> TokenStream:
        stream = original_open(*arguments, **more)
        stream.skip_windows = (tuple(skip),) if skip else ()
        return stream

    def stopping(record: Record, line: dict[str, Any]) -> None:
        original_step(record, line)
        if line["step"] == stop_at:
            set_marker(Path(config.run.dir), Marker.STOP, "for a test")

    ends: list[str] = []

    def closing(engine: Engine, close: Any = Engine.close) -> None:
        digest = hashlib.sha256()
        for tensor in state(engine).values():
            digest.update(tensor.numpy().tobytes())
        ends.append(digest.hexdigest())
        close(engine)

    with (
        patch.object(TokenStream, "__next__", damaged),
        patch.object(opening, "open_stream", opened),
        patch.object(Record, "step", stopping),
        patch.object(Engine, "close", closing),
    ):
        outcome = train(config)
    return {"finished": outcome.finished, "digest": ends[-1]}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if "run" in arguments:
        answers = whole_run(**arguments["run"])
    else:
        world = distributed.start("cpu", 60.0)
        act = {"poisoned": poisoned_steps, "probed": probed_steps}[arguments["act"]]
        answers = {name: act(overrides, world) for name, overrides in arguments["cases"].items()}
        distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
