"""Loaders of token shards side by side: ours and those of peers, in processes of their own, in turn.

Peers live in an environment of their own, made once under a cache directory, its torch held to ours. All read the same
200 M random uint16 tokens in lognormal documents (mean 835) from warm local files, one process, one thread, rows of
4096, batches of 8, int64, globally shuffled. Loaders run one after another, `rounds` times over, so that a busy machine
is busy for all. A figure is the median of the rounds. `cast` is no loader: it reads in order and widens.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.data.manifest import MANIFEST_NAME, TokenizerEntry
from kha_train.data.writer import prepare, publish_dataset, write_shard
from kha_train.errors import KhaError

VOCAB, SHARDS, BATCH, SEQ_LEN = 50_304, 8, 8, 4096
MEAN_DOCUMENT = 835
TRILLIONTH = 10**12 // BATCH
PEERS = ("datatrove", "grain")
_WORKER = Path(__file__).with_name("loaders.py")
_PLAIN = {"isolate_documents": False, "check_crc": False, "reader": "memory_map"}
OURS: dict[str, dict[str, Any]] = {
    "ours": _PLAIN,
    "ours, pread": {**_PLAIN, "reader": "pread"},
    "ours, documents": {**_PLAIN, "isolate_documents": True},
    "ours, documents, CRC, all tensors, pread": {"everything": True},
}


def run_bench(
    cache: Path, *, tokens: int, rounds: int, cpu_seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure every loader; returns the median figures by loader, and why a peer is missing where one is.

    Raises KhaError when our own loader fails.
    """
    root = cache / f"tokens-{tokens}"
    if not (root / "ours" / MANIFEST_NAME).exists():
        say(f"writing {tokens:,} tokens to {root}")
        write_tokens(root, tokens)
    say("installing peers into an environment of their own")
    python = install_peers(cache / "peers")
    found: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    loaders = {"cast": {}, **OURS, **{peer: {} for peer in (*PEERS, "datatrove_loader")}}
    for _ in range(rounds):
        for name, options in loaders.items():
            ours = name in OURS or name == "cast"
            request = {
                "loader": "ours" if name in OURS else name,
                "root": str(root),
                "batch": BATCH,
                "seq_len": SEQ_LEN,
                "vocab": VOCAB,
                "options": options,
                "tokens": tokens,
                "cpu_seconds": cpu_seconds,
                "seek": [3000, TRILLIONTH] if name in OURS else [3000],
                "started": time.time(),
            }
            ended = _run(sys.executable if ours else python, request)
            if isinstance(ended, str):
                if name in OURS:
                    raise KhaError(f"the loader failed: {ended}", field=name)
                missing[name] = ended
            else:
                found.setdefault(name, []).append(ended)
    return {"loaders": {name: _median(figures) for name, figures in found.items()}, "missing": missing}


def write_tokens(root: Path, tokens: int) -> None:
    """The common tokens: our shards, and datatrove's files beside them."""
    generator = np.random.default_rng(0)
    prepare(root / "ours", overwrite=True)
    size, entries = tokens // SHARDS, []
    for index in range(SHARDS):
        ids = generator.integers(0, 50_000, size, dtype=np.uint16)
        mean = np.log(MEAN_DOCUMENT) - 0.5 * 1.2**2
        lengths = np.maximum(1, generator.lognormal(mean, 1.2, 3 * size // MEAN_DOCUMENT + 16)).astype(np.int64)
        ends = np.cumsum(lengths)
        documents = np.split(ids, ends[ends < size])
        contents = ((part, len(part)) for part in documents)
        entries.append(write_shard(root / "ours", index, contents, vocab_size=VOCAB, dtype="uint16"))
    entry = TokenizerEntry("synthetic", VOCAB, "0" * 64, None, {}, (1,) * VOCAB)
    (root / "datatrove").mkdir(exist_ok=True)
    for path in sorted((root / "ours").glob("*.tok")):
        shutil.copy(path, root / "datatrove" / f"{path.stem}.ds")
        shutil.copy(path.with_suffix(".doc"), root / "datatrove" / f"{path.stem}.ds.index")
    publish_dataset(root / "ours", entries, entry, dtype="uint16", corpus={"source": "benchmark"})


def install_peers(environment: Path) -> str:
    """The interpreter of an environment with the peers that install, torch held to ours; made once."""
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        constraints = environment / "constraints.txt"
        constraints.write_text(f"torch=={version('torch')}\n")
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
        for package in ("torch", *PEERS):
            subprocess.run([*pip, package], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (environment / "ready").touch()
    return str(python)


def format_table(result: dict[str, Any]) -> str:
    """The figures as text, each loader's speed also as a multiple of the fastest peer's."""
    figures = result["loaders"]
    fastest = max((f["million_tokens_per_cpu_second"] for n, f in figures.items() if n in PEERS), default=float("nan"))
    lines = [f"{'loader':<42}{'M tok/CPU-s':>12}{'x peer':>8}{'M tok/s':>9}{'first s':>9}{'MB':>6}  seek ms"]
    for name, f in figures.items():
        speed = f["million_tokens_per_cpu_second"]
        seek = " ".join(f"{ms:.2f}" for ms in f["seek_ms"]) or "-"
        lines.append(
            f"{name:<42}{speed:>12.0f}{speed / fastest:>8.2f}{f['million_tokens_per_second']:>9.0f}"
            f"{f['seconds_to_first_batch']:>9.1f}{f['private_mb']:>6.0f}  {seek}"
        )
    return "\n".join([*lines, *(f"{name}: not measured: {why}" for name, why in result["missing"].items())])


def _run(python: str, request: dict[str, Any]) -> dict[str, Any] | str:
    """The worker's answer, or the last line of its complaint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(
            [python, str(_WORKER)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no answer within 300 s"
    lines = ended.stderr.strip().splitlines()
    return json.loads(ended.stdout) if ended.stdout else (lines[-1] if lines else f"exit {ended.returncode}")


def _median(figures: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("million_tokens_per_cpu_second", "million_tokens_per_second", "seconds_to_first_batch", "private_mb")
    seek = [statistics.median(column) for column in zip(*(one["seek_ms"] for one in figures), strict=True)]
    return {key: statistics.median(one[key] for one in figures) for key in keys} | {"seek_ms": seek}
