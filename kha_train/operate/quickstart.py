"""The first minutes: a corpus, a tokenizer and shards, then two models trained on the same data and compared.

Each stage is the very thing a user would call, on the real path: the models are trained by torchrun under ZeRO. A stage
whose result is there already is not repeated, so an interrupted quickstart goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.corpus import build_corpus
from data_tools.encode import encode_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.analysis.compare import compare_runs
from kha_train.analysis.report import write_report
from kha_train.config.compose import compose
from kha_train.data.manifest import MANIFEST_NAME
from kha_train.data.stream import unigram_bits_per_byte
from kha_train.errors import KhaError

VARIANTS = ("gqa", "kha_mlp")
Say = Callable[[str], None]


def run_quickstart(out: Path, *, steps: int, processes: int, say: Say) -> dict[str, Any]:
    """Make everything under `out` and return what came of it: seconds by stage, bits per byte by variant, paths.

    `say` receives the lines for the user. Raises KhaError when a stage fails; its own output is shown above.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str):
        say(f"[{len(seconds) + 1}/{4 + len(VARIANTS)}] {name}")
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    with stage("corpus"):
        if not (out / "corpus" / "corpus.json").exists():
            build_corpus(out / "corpus")
    with stage("tokenizer"):
        if not (out / "tokenizer.model").exists():
            train_tokenizer(out / "corpus", out / "tokenizer.model", vocab_size=compose().model.vocab_size)
    with stage("shards"):
        if not (out / "shards" / "validation" / MANIFEST_NAME).exists():
            encode_corpus(out / "corpus", out / "tokenizer.model", out / "shards", overwrite=True)
    for variant in VARIANTS:
        with stage(f"train {variant}"):
            _train(_overrides(out, variant, steps), processes)
    with stage("comparison"):
        comparison = compare_runs([out / "runs" / variant for variant in VARIANTS])
        report = write_report(comparison, out / "report")
    unigram = unigram_bits_per_byte(compose(_overrides(out, VARIANTS[0], steps)))
    return _summary(comparison, report, unigram, seconds, out, say)


def _overrides(out: Path, variant: str, steps: int) -> list[str]:
    return [
        f"attention={variant}",
        f"run.dir='{out / 'runs' / variant}'",
        f"run.steps={steps}",
        f"data.train='{out / 'shards' / 'train'}'",
        f"data.validation='{out / 'shards' / 'validation'}'",
        f"validation.every_steps={max(steps // 2, 1)}",
        "validation.rows=64",
        "telemetry.wandb.mode=offline",
    ]


def _train(overrides: list[str], processes: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    ended = subprocess.run([*torchrun, "-m", "kha_train", *overrides], check=False)
    if ended.returncode:
        raise KhaError(
            f"training ended with code {ended.returncode}", fix="see the lines above; the same command resumes"
        )
