"""The quickstart: a corpus, a tokenizer and shards, then two models trained on the same data and compared.

Each stage uses what users would call themselves; the models are trained by `kha train --ranks` under ZeRO. A stage with
an existing result is skipped, so an interrupted quickstart continues where it stopped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.report.page import write_report
from kha_train.config.compose import compose
from kha_train.data.stream import unigram_bits_per_byte
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import KhaError
from kha_train.operate.datasets import Say, text_stages
from kha_train.record import Marker, read_marker

VARIANTS = ("gqa", "kha_mlp")
STAGES = 4 + len(VARIANTS)


def run_quickstart(out: Path, *, steps: int, processes: int, say: Say, tokenizer: Path | None = None) -> dict[str, Any]:
    """Make everything under `out` and return the results: seconds by stage, bits per byte by variant, paths. With a
    `tokenizer` none is trained, and the models have its vocabulary.

    `say` receives the lines for the user. Raises KhaError when a stage fails; the output of training stands above.
    """
    seconds: dict[str, float] = {}
    vocab = [] if tokenizer is None else [f"model.vocab_size={open_tokenizer(tokenizer).vocab_size}"]
    for name, (done, make) in text_stages(out, tokenizer).items():
        with _timed(name, seconds, say):
            if not done.exists():
                make()
    for variant in VARIANTS:
        with _timed(f"train {variant}: {steps} steps on {processes} ranks", seconds, say):
            _train(_run_dir(out, variant, steps), [*_overrides(out, variant, steps), *vocab], processes)
    with _timed("comparison", seconds, say):
        comparison = compare_runs([_run_dir(out, variant, steps) for variant in VARIANTS])
        report = write_report(comparison, out / "report")
        unigram = unigram_bits_per_byte(compose([*_overrides(out, VARIANTS[0], steps), *vocab]))
    result = {
        "seconds": seconds,
        "unigram_bits_per_byte": unigram,
        "bits_per_byte": {run["variant"]: run["bits_per_byte"] for run in comparison.to_dict()["runs"]},
        "evidence": comparison.evidence,
        "caveats": [caveat for pair in comparison.pairs for caveat in pair.caveats],
        "validation_sets": comparison.validation_words,
        "report": str(report),
    }
    _close(result, out, steps, vocab, say)
    return result


@contextmanager
def _timed(name: str, seconds: dict[str, float], say: Say) -> Iterator[None]:
    say(f"[{len(seconds) + 1}/{STAGES}] {name}")
    started = time.perf_counter()
    yield
    seconds[name.partition(":")[0]] = time.perf_counter() - started
    say(f"      {seconds[name.partition(':')[0]]:.1f} s")


def _run_dir(out: Path, variant: str, steps: int) -> Path:
    return out / "runs" / f"{variant}-{steps}"


def _overrides(out: Path, variant: str, steps: int) -> list[str]:
    paths = {
        "run.dir": _run_dir(out, variant, steps),
        "data.train": out / "shards" / "train",
        "data.validation": out / "shards" / "validation",
    }
    # Hydra needs quotes around paths with other characters.
    quoted = [
        f"{key}={path}" if re.fullmatch(r"[\w./-]+", str(path)) else f"{key}='{path}'" for key, path in paths.items()
    ]
    common = ["engine.device=cpu", "validation.rows=64", "telemetry.wandb.mode=offline"]
    return [f"attention={variant}", f"run.steps={steps}", *common, *quoted]


def _train(run_dir: Path, overrides: list[str], processes: int) -> None:
    command = [sys.executable, "-m", "kha_train", "--ranks", str(processes), *overrides]
    # One thread per rank, as many ranks as cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # The trainer's output goes to standard error, so that `--json` leaves only JSON on standard output.
    training = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        code = training.wait()
    except KeyboardInterrupt:
        # The ranks got the signal too: they finish their step and save.
        training.wait()
        raise
    if code:
        raise _explained(run_dir, code)


def _explained(run_dir: Path, code: int) -> KhaError:
    """The error that the ranks left in the run's FATAL marker, of its own kind; or a general one."""
    line = read_marker(run_dir, Marker.FATAL)
    for kind in KhaError.__subclasses__():
        if line.startswith(f"{kind.kind} error: "):
            return kind(line.partition(": ")[2])
    return KhaError(
        f"training ended with code {code}", fix="see the lines above; the same command continues from there"
    )


def _close(result: dict[str, Any], out: Path, steps: int, vocab: list[str], say: Say) -> None:
    command = "kha" if shutil.which("kha") else os.path.relpath(Path(sys.executable).with_name("kha"))
    say("")
    say(f"validation bits per byte (unigram entropy of the text: {result['unigram_bits_per_byte']:.3f})")
    for variant, bits in result["bits_per_byte"].items():
        say(f"  {variant:<10} {'-' if bits is None else format(bits, '.4f')}")
    for words in (*(f"not a fair pair: {caveat}" for caveat in result["caveats"]), result["validation_sets"]):
        say(words)
    say(f"{result['evidence']}; total {sum(result['seconds'].values()):.0f} s")
    say(f"report: {result['report']}")
    say(f"next:   {command} train {shlex.join([*_overrides(out, 'kha_linear', steps), *vocab])}")
    say(f"then:   {command} compare {shlex.quote(str(out))}/runs/*-{steps}")
