"""Steps of two micro-batches on every rank; reports for each step the bytes that its collectives would send in rings,
by collective: among `all` ranks, and inside `groups` of them.

The collectives of torch.distributed are counted from outside, whoever calls them: an all-reduce of S bytes sends 2 S (N
- 1) / N from every rank, a reduce-scatter, all-gather, all-to-all or broadcast of S bytes (all ranks' parts) S (N - 1)
/ N, a message its size. Those of `kha_train.collectives` count as a whole.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

torch.set_num_threads(1)

TIMES_SENT = {
    "all_reduce": 2,
    "reduce": 1,
    "broadcast": 1,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "isend": 1,
    "ordered_reduce_scatter": 1,
}
sent: Counter[tuple[str, int]] = Counter()
running = [False]


def size(argument: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list."""
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(size(part) for part in argument) if isinstance(argument, list | tuple) else 0


def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    """`collective`, adding what it moves to `sent`; the largest argument is the whole, of which ranks have parts."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if running[0]:
            return collective(*args, **kwargs)
        running[0] = True
        try:
            whole = max(size(argument) for argument in (*args, *kwargs.values()))
            ranks = torch.distributed.get_world_size(kwargs.get("group"))
            sent[name, ranks] += whole if name == "isend" else TIMES_SENT[name] * whole * (ranks - 1) // ranks
            return collective(*args, **kwargs)
        finally:
            running[0] = False

    return call


if __name__ == "__main__":
    # Before DeepSpeed is imported: it keeps references to some of them.
    for name in TIMES_SENT.keys() - {"ordered_reduce_scatter"}:
        setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))
    from kha_train import collectives

    for name in ("all_gather", "ordered_reduce_scatter"):
        setattr(collectives, name, counted(name, getattr(collectives, name)))
    from kha_train import compose, distributed
    from kha_train.data.rows.batch import Batch
    from kha_train.data.rows.packing import Layout
    from kha_train.engine.deepspeed import Engine

    arguments = json.loads(sys.argv[1])
    config = compose(arguments["overrides"])
    world = distributed.start("cpu", 300.0)
    rows, tokens = config.engine.micro_batch_size, config.model.seq_len
    drawn_BW = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, tokens + 1)).astype(np.uint16)
    layout = Layout(np.arange(rows + 1) * tokens, np.empty(0, dtype=np.int64))
    batch = Batch(np.arange(rows), drawn_BW, layout)
    engine = Engine(config, world)
    steps = []
    for _ in range(arguments["steps"]):
        sent.clear()
        for last in (False, True):
            engine.accumulate(batch, 1.0, 0.0, last)
        engine.apply(1e-4)
        steps.append(sent.copy())
    engine.close()
    distributed.stop()
    answer = [
        {
            "all": {name: count for (name, ranks), count in step.items() if ranks == world.size},
            "groups": {name: count for (name, ranks), count in step.items() if ranks < world.size},
        }
        for step in steps
    ]
    Path(sys.argv[2]).write_text(json.dumps(answer))
