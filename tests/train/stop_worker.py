"""Two ranks train a run twice: at once, and with a SIGTERM to the last rank alone amid steps 1, 4 and 4 again."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from kha_train.config.compose import compose
from kha_train.engine.deepspeed import Engine
from kha_train.train import patience
from kha_train.train.run import train

torch.set_num_threads(1)
patience.PATIENCE_SECONDS = 0.0


def main(given: dict[str, Any]) -> dict[str, Any]:
    """`ends`: (step, finished) of every attempt; `said`: how often each line about the stop was on standard error."""
    said = io.StringIO()
    count, wanted = [0], [-1]
    accumulate = Engine.accumulate

    def counted(engine: Engine, *arguments: Any, **options: Any) -> Any:
        output = accumulate(engine, *arguments, **options)
        count[0] += 1
        if count[0] == wanted[0] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    Engine.accumulate = counted  # type: ignore[method-assign]

    def attempt(run_dir: str, at: int = -1) -> tuple[int, bool]:
        count[0], wanted[0] = 0, at
        # A rank that is early must not meet the others at what is left of the attempt before.
        os.environ["MASTER_PORT"] = str(given["ports"].pop())
        with redirect_stderr(said):
            outcome = train(compose([*given["overrides"], f"run.dir={run_dir}"]))
        return outcome.step, outcome.finished

    ends = [attempt(given["straight"])]
    # Of four micro-batches a step the second of step 1, the first of step 4, and the first after the resume.
    ends += [attempt(given["stopped"], at) for at in (2, 13, 1, -1)]
    lines = ("another rank was asked to stop: waiting for micro-batch ", "stopped in good order after step ")
    return {"ends": ends, "said": [said.getvalue().count(line) for line in lines]}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(sys.argv[1]))))
