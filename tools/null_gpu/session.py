"""One process on the null device: `python session.py FOLDER`, with cases (name, command) in FOLDER/cases.jsonl.

Prints a JSON line for each: its name, the exit code, the seconds and, of a failure, the end of its output. Nothing is
computed here: checks that compare values are passed over (`pass_over_values` lists them), and numbers of the device
that decide about shapes or are counted are given by the host (`know_numbers`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")


def pass_over_values() -> None:
    """Replace the checks that rightly refuse a device which computes nothing."""
    from kha_train.evaluate.bits_per_byte import BitsPerByte
    from kha_train.model import kernel_choice
    from kha_train.model.attention import choice, measured
    from kha_train.model.moe import experts

    experts.check_empty_groups = lambda device, dtype: None
    choice.check_against_maths = measured.check_against_maths = _differentiated
    kernel_choice._compare = lambda part, found, expected: None
    BitsPerByte.figures = lambda self, sums: {"loss": 0.0, "bits_per_byte": 0.0}


def _differentiated(config, name, device, dtype):
    """The backend is called and differentiated as its check does, without comparing numbers."""
    import torch

    from kha_train.model.attention import choice
    from kha_train.model.attention.backends import BACKENDS, lay_out_documents

    inputs = choice.attention_inputs(config, 2, 256, device, dtype)
    for borders in (None, choice.CHECK_BORDERS) if config.data.isolate_documents else (None,):
        borders_S = None if borders is None else torch.tensor(borders, dtype=torch.int32, device=device)
        documents = lay_out_documents(2, 256, device, borders_S, masked=not choice.TRAITS[name].packed)
        choice._outputs_and_gradients(BACKENDS[name], inputs, documents)


def know_numbers() -> None:
    """Replace what a kernel would count: routing is even, so that ranks that share experts agree on the lengths of
    their messages, and an optimiser has taken the steps that it was asked for.
    """
    import torch

    from kha_train.model.moe import router
    from kha_train.optim import ShareOptimizer

    def even(expert_NJ: torch.Tensor, experts: int) -> torch.Tensor:
        copies, rest = divmod(expert_NJ.numel(), experts)
        counts = [copies + (expert < rest) for expert in range(experts)]
        return torch.tensor(counts, dtype=torch.int64).to(expert_NJ.device)

    stepped = ShareOptimizer.step

    def step(self: ShareOptimizer, closure: None = None) -> None:
        stepped(self, closure)
        # DeepSpeed calls it once for each parameter group.
        for group in self.param_groups:
            for share in group["params"]:
                counted(self)[share] += 1

    def counted(self: ShareOptimizer) -> Counter[torch.Tensor]:
        return vars(self).setdefault("counted_steps", Counter())

    def know(self: ShareOptimizer, count: int) -> None:
        counted(self).update({share: count - counted(self)[share] for share in self.state})

    router.count_experts = even
    ShareOptimizer.step = step
    ShareOptimizer.steps = property(lambda self: max(counted(self).values(), default=0), know)


def run_case(command: list[str]) -> tuple[int, str]:
    """The exit code of a `kha` command in this process (1 for an exception), and what it printed."""
    from kha_train.cli.main import run

    told = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            run(command)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:  # noqa: BLE001  # any of them is what this tool looks for
            told.write(traceback.format_exc())
            code = 1
    return code, told.getvalue()


def main() -> None:
    """Run all cases, each with the data of this session."""
    folder = Path(sys.argv[1])
    os.environ["KHA_DEBUG"] = "1"
    pass_over_values()
    know_numbers()
    for line in (folder / "cases.jsonl").read_text().splitlines():
        name, command = json.loads(line)
        if command[0] == "train":
            command += [f"data.train={folder}/data/train", f"data.validation={folder}/data/validation"]
        started = time.monotonic()
        code, told = run_case([word.replace("{folder}", str(folder)) for word in command])
        result = {"name": name, "code": code, "seconds": round(time.monotonic() - started, 1)}
        if int(os.environ.get("RANK", "0")) == 0 or code:
            print(
                "RESULT " + json.dumps(result | ({"output": told[-3000:]} if code else {})),
                file=sys.__stdout__,
                flush=True,
            )


if __name__ == "__main__":
    main()
