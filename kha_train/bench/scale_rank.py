"""One rank of `kha bench scale`, a process that its starter tells what to do.

Its argument is JSON: the settings of every arm by name, and the names of those whose gradients leave only when the
backward has ended. It answers `ready` once the engines of all arms are built. Then every line of its input names an
arm; all ranks take a step of it together, and answer with the seconds that it took. The end of the input ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TextIO

from kha_train import distributed
from kha_train.config.compose import compose
from kha_train.data.stream import open_stream
from kha_train.engine.default import engine_for
from kha_train.train.step import next_batch, train_step

BATCHES = 4


def main(arms: dict[str, list[str]], afterwards: list[str], asked: TextIO, answers: TextIO) -> None:
    """Build the engines of `arms`, which see the same global batches, and take the steps that are asked for. Gradients
    of those in `afterwards` leave when the backward has ended.
    """
    configs = {name: compose(settings) for name, settings in arms.items()}
    first = next(iter(configs.values()))
    world = distributed.start("cpu", first.engine.collective_timeout_seconds)
    engines = {name: engine_for(config, world.size)(config, world) for name, config in configs.items()}
    for name in afterwards:
        # Nobody else wants that, so engines do not offer it.
        vars(engines[name])["_reduction"].waits_for_backward = True
    stream = open_stream(first, world.rank, world.size)
    batches = [next_batch(stream, world) for _ in range(BATCHES)]
    steps = dict.fromkeys(arms, 0)
    print("ready", file=answers, flush=True)
    for line in asked:
        name = line.strip()
        batch, labels = batches[steps[name] % BATCHES]
        steps[name] += 1
        world.barrier()
        began = time.perf_counter()
        train_step(engines[name], batch, labels, first.optim.lr * 0.1)
        print(time.perf_counter() - began, file=answers, flush=True)


if __name__ == "__main__":
    # Whatever libraries print must not be taken for an answer.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(**json.loads(sys.argv[1]), asked=sys.stdin, answers=told)
