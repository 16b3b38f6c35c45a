"""One step of two micro-batches on every rank; reports the peak growth of private memory since just before it.

Private memory is the resident set minus file and shared pages. The kernel keeps an exact high-water mark; writing 5 to
clear_refs resets it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from kha_train import compose, distributed
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.engine.deepspeed import Engine

torch.set_num_threads(1)


def status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


if __name__ == "__main__":
    config = compose(json.loads(sys.argv[1])["overrides"])
    world = distributed.start("cpu", 300.0)
    rows, tokens = config.engine.micro_batch_size, config.model.seq_len
    drawn_BW = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, tokens + 1)).astype(np.uint16)
    layout = Layout(np.arange(rows + 1) * tokens, np.empty(0, dtype=np.int64))
    batch = Batch(np.arange(rows), drawn_BW, layout)
    Path("/proc/self/clear_refs").write_text("5")
    before = status()
    engine = Engine(config, world)
    for last in (False, True):
        engine.accumulate(batch, 1.0, 0.0, last)
    engine.apply(1e-4)
    after = status()
    mapped = sum(after[name] - before[name] for name in ("RssFile", "RssShmem"))
    engine.close()
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(after["VmHWM"] - before["VmRSS"] - mapped))
