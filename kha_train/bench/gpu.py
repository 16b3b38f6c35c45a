"""Runs everything that needs a GPU in one short run: tests first, then benchmarks, the most informative first.

Figures of a kernel that computes wrong numbers are worthless, so parity comes first. Then come the most important
measurements: layers of the 6.1B model with GQA and KHA in turns, with and without Triton kernels, the whole model, the
peer, single operations. Every stage is a command that can also be run alone. It has a time limit of its own plus the
time that earlier stages left over, and starts only if time is left. Results are written at once, so an interrupted run
keeps what it had. Nothing reads the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kha_train.bench import protocol
from kha_train.bench.everything import run_one
from kha_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GQA, KHA = ("--arm", "attention=gqa"), ("--arm", "attention=kha_mlp")

NEEDED = ("deepspeed", "hydra", "omegaconf", "sentencepiece", "safetensors", "rich", "typer", "pytest", "hypothesis")


@dataclass(frozen=True)
class Stage:
    """`command` holds the arguments of `kha bench`, or of pytest; `limit` is its time limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


def stages(rehearse: bool) -> list[Stage]:
    """The stages to run. A rehearsal runs the same commands at sizes for a CPU, and says nothing about speed."""
    if rehearse:
        tiny = ("engine.device=cpu", "model.layers=1", "model.seq_len=32", "data.global_batch_size=2")
        step = (*tiny, "engine.micro_batch_size=2", "--blocks", "3", "--warmup", "1")
        return [
            Stage("tests", ("pytest", "tests/gpu"), 120),
            Stage("attention layer", ("attention", "engine.device=cpu", "model.seq_len=32", "--blocks", "3"), 60),
            Stage("step, GQA and KHA", ("step", *step, *GQA, *KHA), 90),
        ]
    one = ("model=moe_6b", "engine.micro_batch_size=1", "data.global_batch_size=2")
    # 3 / 18 of the layers and of the vocabulary: the head then has a fifth of the operations, as in the whole model.
    # Three such models with their optimisers fit in 80 GB.
    layers = (*one, "model.layers=3", "model.vocab_size=26208")
    isolated, unsplit = ("attention.backend=varlen",), ("data.isolate_documents=false", "attention.backend=cudnn")
    timed = ("--warmup", "10", "--blocks", "15", "--steps", "2")
    alone = ("--warmup", "5", "--blocks", "15")
    whole = (*one, "engine=zero2", "engine.activation_checkpointing=full")
    peer = ("--against", "transformers", "--peers", str(ROOT / "tests" / "peers"))
    linear = ("--arm", "attention=kha_linear")
    kernels = ("--arm", "attention=kha_mlp engine.kernels=torch", "--arm", "attention=kha_mlp engine.kernels=triton")
    return [
        Stage("tests", ("pytest", "tests"), 140),
        Stage("step, GQA and KHA", ("step", *layers, *isolated, *GQA, *KHA, *linear, *timed), 85),
        Stage("the whole 6.1B model", ("step", *whole, *isolated, *KHA, *alone), 75),
        Stage("beside transformers", ("step", *layers, *unsplit, *GQA, *peer, *timed), 50),
        Stage("the whole, unsplit rows", ("step", *whole, *unsplit, *KHA, *alone), 70),
        Stage("step, kernels", ("step", *layers, *isolated, *kernels, *timed), 40),
        Stage("step, unsplit rows", ("step", *layers, *unsplit, *GQA, *KHA, *timed), 40),
        Stage("attention layer", ("attention", *one, "--blocks", "30"), 14),
        Stage("experts", ("moe", *one), 14),
    ]


def check_packages() -> None:
    """Raises ConfigError with all packages that stages import but that are missing or built for another Python, before
    time is spent.
    """
    lacking = [name for name in NEEDED if not _is_importable(name)]
    if lacking:
        raise ConfigError(
            f"packages are missing: {', '.join(lacking)}",
            field="bench gpu",
            fix="no network there: `make gpu-wheels` elsewhere, then PYTHONPATH=gpu-wheels (docs/performance.md)",
        )


def _is_importable(name: str) -> bool:
    """DeepSpeed is not imported here: that takes seconds, and it has no compiled parts."""
    if name == "deepspeed" or find_spec(name) is None:
        return find_spec(name) is not None
    tried = subprocess.run([sys.executable, "-c", f"import {name}"], check=False, capture_output=True)
    return tried.returncode == 0


def measure(out: Path, *, seconds: float, rehearse: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all stages within `seconds`; writes `results.json` and `results.md` to `out`, and returns their content.

    Raises ConfigError without a CUDA device, except for a rehearsal, and when packages are missing.
    """
    if not torch.cuda.is_available() and not rehearse:
        raise ConfigError(
            "no CUDA device here; nothing was measured",
            field="bench gpu",
            fix="run it on a machine with one; --rehearse runs the same stages at tiny sizes on a CPU",
        )
    check_packages()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if rehearse else "cuda")
    started, due = time.monotonic(), 0.0
    found: dict[str, Any] = {"rehearsal": rehearse, "environment": protocol.environment(device), "stages": {}}
    for stage in stages(rehearse):
        due += stage.limit
        left = min(due, seconds) - (time.monotonic() - started)
        if left < 5:
            found["stages"][stage.name] = {"error": f"no time left of {seconds:.0f} s", "seconds": 0.0}
        else:
            say(f"{stage.name}: {' '.join(stage.command)}")
            found["stages"][stage.name] = _run(stage, left)
        found["stages"][stage.name]["command"] = " ".join(stage.command)
        (out / "results.json").write_text(json.dumps(found, indent=1))
        (out / "results.md").write_text(as_markdown(found))
    return found


def as_markdown(found: dict[str, Any]) -> str:
    """The table for docs/performance.md, and a line for every stage without a row."""
    lines = ["REHEARSAL: says nothing about speed" if found["rehearsal"] else protocol.told(found["environment"]), ""]
    if unproven(found):
        lines += [
            "UNPROVEN: the tests before these figures did not pass, so the figures may belong to wrong numbers",
            "",
        ]
    lines += [
        "| stage | arm | ms | ratio [95 %] | tokens/s | MFU | by documents | PaLM's | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    others: list[str] = []
    for name, stage in found["stages"].items():
        for answer in _steps(stage):
            mark = f"{name} (unproven)" if unproven(found) else name
            lines += [_row(mark, arm, figures) for arm, figures in answer["arms"].items()]
        outcome = stage.get("error") or stage.get("summary") or "done"
        others.append(f"- {name}, {stage['seconds']:.0f} s: {outcome}; `{stage['command']}`")
    return "\n".join([*lines, "", *others, ""])


def unproven(found: dict[str, Any]) -> bool:
    """Whether a stage of tests failed or had no time: the figures are then of unchecked kernels."""
    return any(stage["command"].startswith("pytest") and "error" in stage for stage in found["stages"].values())


def _steps(stage: dict[str, Any]) -> list[dict[str, Any]]:
    answer = stage.get("answer", {})
    return [one for one in answer.values() if isinstance(one, dict) and "arms" in one]


def _row(stage: str, arm: str, figures: dict[str, Any]) -> str:
    memory, blocks = figures["peak_gib"], len(figures.get("block_seconds", ()))
    ways = " | ".join(f"{100 * figures[name]:.1f} %" for name in ("mfu", "mfu_documents", "mfu_palm"))
    return (
        f"| {stage} | `{arm}` | {1000 * figures['seconds']:.1f} | "
        f"{protocol.shown(figures['against_base'], blocks, digits=4)} | {figures['tokens_per_second']:,.0f} | {ways} | "
        f"{'' if memory is None else f'{memory:.1f}'} |"
    )


def gpu_tests(stage: Stage) -> list[str]:
    """The files with GPU tests. Others may import packages that the machine lacks, so they are not collected."""
    files = [path for folder in stage.command[1:] for path in sorted((ROOT / folder).rglob("test_*.py"))]
    return [str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def _run(stage: Stage, limit: float) -> dict[str, Any]:
    if stage.command[0] != "pytest":
        return run_one([*stage.command, "--json"], limit)
    started = time.perf_counter()
    if not (ROOT / "tests").is_dir():
        return {"error": "no tests here: run it in a checkout", "seconds": 0.0}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *gpu_tests(stage)]
    try:
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        told = (late.stdout or b"").decode(errors="replace")
        return {"error": f"not done after {limit:.0f} s", "seconds": limit, "output": told[-4000:]}
    last = (ended.stdout.strip().splitlines() or ["no result"])[-1]
    result = {"seconds": time.perf_counter() - started, "summary": last, "output": ended.stdout[-4000:]}
    return result | ({} if ended.returncode == 0 else {"error": last})
