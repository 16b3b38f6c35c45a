"""Steps on ranks that stand in network namespaces of their own; reports for each case the bytes of a step that this
rank's interface sent and received.

The kernel counts them, headers and acknowledgements included, so whatever a collective does inside is seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from kha_train import compose, distributed, open_stream
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.train.step import next_batch

torch.set_num_threads(1)
STEPS = 4


def counted(interface: str) -> list[int]:
    """The bytes that `interface` sent and received so far."""
    statistics = Path("/sys/class/net", interface, "statistics")
    return [int((statistics / f"{way}_bytes").read_text()) for way in ("tx", "rx")]


def step(engine: Engine, world: World, batch: object, labels: int) -> None:
    parts = list(batch.micro_batches(engine.config.engine.micro_batch_size))
    for number, part in enumerate(parts, start=1):
        engine.accumulate(part, world.size / labels, 0.0, last=number == len(parts))
    engine.apply(1e-4)


def run_case(overrides: list[str], world: World, interface: str) -> list[int]:
    """The least bytes of a step after the first two, in which an engine may still learn: on a busy machine the kernel
    loses packets and sends them again."""
    config = compose(overrides)
    stream, engine = open_stream(config, world.rank, world.size), Engine(config, world)
    batch, labels = next_batch(stream, world)
    for _ in range(2):
        step(engine, world, batch, labels)
    steps = []
    for _ in range(STEPS):
        world.barrier()
        before = counted(interface)
        step(engine, world, batch, labels)
        world.barrier()
        steps.append([after - count for after, count in zip(counted(interface), before, strict=True)])
    engine.close()
    return [min(way) for way in zip(*steps, strict=True)]


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    world = distributed.start("cpu", 120.0)
    interface = arguments["interface"]
    answer = {name: run_case(overrides, world, interface) for name, overrides in arguments["cases"].items()}
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answer))
