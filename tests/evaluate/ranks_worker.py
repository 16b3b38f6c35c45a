"""What every task makes of one untrained model under each ZeRO stage, and of shared rows; answers the entries of the
record by these.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from kha_train import compose, distributed
from kha_train.engine.deepspeed import Engine
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.scoring import evaluate

torch.set_num_threads(1)

if __name__ == "__main__":
    overrides = json.loads(sys.argv[1])["overrides"]
    world = distributed.start("cpu", 60.0)
    answers = {}
    for stage, parts in ((1, 1), (2, 1), (3, 1), (1, 2)):
        config = compose([*overrides, f"engine.zero_stage={stage}", f"engine.context_parallel={parts}"])
        engine = Engine(config, world)
        answers[f"ZeRO {stage}, rows in {parts}"] = evaluate(engine, open_tasks(config))
        engine.close()
    distributed.stop()
    Path(sys.argv[2]).write_text(json.dumps(answers))
