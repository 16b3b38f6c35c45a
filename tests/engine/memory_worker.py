"""One step of two micro-batches on every rank; answers how far private memory grew, at most, since just before.

Private memory is the resident set less file and shared pages. The kernel keeps its high-water mark exactly; writing 5
to clear_refs starts it afresh.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from kha_train import compose, distributed
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
    drawn = torch.randint(0, config.model.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = SimpleNamespace(
        samples_B=np.arange(rows),
        tokens_BT=drawn,
        labels_BT=drawn,
        positions_BT=torch.arange(tokens).expand(rows, tokens),
        cu_seqlens_S=torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32),
        max_seqlen=tokens,
    )
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
