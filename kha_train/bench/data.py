"""Compares loaders of token shards, ours and those of peers, in separate processes that take turns.

Peers live in a separate environment, made once under a cache directory, with the same torch as ours. All read the same
200 M random uint16 tokens in lognormal documents (mean 835) from warm local files: one process, one thread, rows of
4096, batches of a few rows, int64, shuffled. Loaders run one after another, `rounds` times, so that load on the machine
affects all of them. A figure is the median over the rounds. Speeds are those of the second pass over the tokens, and of
the first one, in which a process touches each page of a mapped file for the first time. `cast` is not a loader: it
reads in order and widens, or copies shuffled rows and widens them. "The same work" means shuffled rows as int64
tensors, without document borders and integrity checks; the cost of these in our loader is listed below it. Our memory
and seek time are also measured at a billion rows, on sparse files of zeros: in a process that reads a run's saved
configuration, and in one where Hydra composes it.

With `--cold` files are dropped from the page cache before each loader starts. The figures are then wall seconds and
bytes from disk for the first 31 batches. (After that the small files are in memory again.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kha_train.bench.loaders import CONFIG, NO_LOADERS
from kha_train.bench.peers import load_loaders
from kha_train.bench.protocol import environment, told
from kha_train.config.compose import compose, dump
from kha_train.data.format.manifest import CRC_BLOCK_BYTES, FileEntry, ShardEntry, TokenizerEntry
from kha_train.data.format.shards import ShardSet
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.errors import KhaError

VOCAB, SHARDS, SEQ_LEN = 50_304, 8, 4096
MEAN_DOCUMENT = 835
HUGE_ROWS, NEAR, FAR = 10**9, 24_000, 10**12
_ROOT = Path(__file__).parents[2]
_PLAIN = {"isolate_documents": False, "check_crc": False, "reader": "memory_map"}
OURS: dict[str, dict[str, Any]] = {
    "ours": _PLAIN,
    "ours, pread": {**_PLAIN, "reader": "pread"},
    "ours, documents": {**_PLAIN, "isolate_documents": True},
    "ours, documents, CRC, all tensors, pread": {},
}
"""Differences from the defaults of `data`; the last one also makes every tensor of a batch."""


def run_bench(
    cache: Path,
    *,
    tokens: int,
    batch: int,
    rounds: int,
    cpu_seconds: float,
    cold: bool = False,
    document_tokens: int = MEAN_DOCUMENT,
    peers: Path | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every loader with batches of `batch` rows on documents of the given mean length: ours, and those of the
    adapters in the folder `peers`. Returns the median figures by loader, and the reason for each missing peer. Raises
    KhaError when our own loader fails, ConfigError when `peers` has no adapters of loaders.
    """
    others = load_loaders(peers) if peers else None
    names = tuple(others.PEERS) if others else ()
    root = cache / (f"tokens-{tokens}" if document_tokens == MEAN_DOCUMENT else f"tokens-{tokens}-{document_tokens}")
    _make_tokens(root, tokens, document_tokens, say)
    python = sys.executable
    if others:
        say("installing peers into a separate environment (once)")
        python = install_peers(cache / f"peers-torch-{version('torch')}", others.PACKAGES, say)
    amount: dict[str, Any] = {"tokens": tokens, "batch": batch, "cpu_seconds": cpu_seconds}
    about = amount | {
        "rounds": rounds,
        "cold": cold,
        "document_tokens": document_tokens,
        "peers": _peer_versions(python, others.PACKAGES) if others else {},
    }
    protocol = environment(torch.device("cpu")) | about
    missing: dict[str, str] = {}
    for peer in names:
        say(f"preparing {peer}")
        ended = _run(python, _request(root, peer, **amount, adapters=peers, only_prepare=True))
        if isinstance(ended, str):
            missing[peer] = ended
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for name in [name for name in (*NO_LOADERS, *OURS, *names) if name not in missing]:
            say(f"round {number + 1} of {rounds}: {name}")
            if cold:
                _drop_from_page_cache(root)
            if name in names:
                ended = _run(python, _request(root, name, **amount, adapters=peers))
            elif name in OURS:
                ended = _run_ours(root, OURS[name], everything=not OURS[name], **amount)
            else:
                ended = _run(sys.executable, _request(root, name, **amount))
            if not isinstance(ended, str):
                found.setdefault(name, []).append(ended)
            elif name in names:
                missing[name] = ended
            else:
                raise KhaError(f"the loader failed: {ended}", field=name)
    result = {"loaders": {name: _median(runs) for name, runs in found.items()}}
    if not cold:
        result["huge"] = _at_a_billion_rows(cache, batch, rounds)
    return result | {"missing": missing, "protocol": protocol}


def _make_tokens(root: Path, tokens: int, document_tokens: int, say: Callable[[str], None]) -> None:
    """Write the common tokens unless they are there."""
    if not _is_whole(root / "ours"):
        say(f"writing {tokens:,} tokens to {root}")
        shutil.rmtree(root, ignore_errors=True)
        write_tokens(root, tokens, document_tokens)


def _at_a_billion_rows(cache: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Private memory and seek time of our loader. Raises KhaError when it fails."""
    root = cache / "sparse"
    if not _is_whole(root / "ours"):
        shutil.rmtree(root, ignore_errors=True)
        write_sparse(root)
    amount: dict[str, Any] = {"tokens": HUGE_ROWS * SEQ_LEN, "batch": batch, "cpu_seconds": 0.05}
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for _ in range(rounds):
        for whole, answers in found.items():
            ended = _run_ours(root, _PLAIN, composed=whole, **amount)
            if isinstance(ended, str):
                raise KhaError(f"the loader failed: {ended}", field="a billion rows")
            answers.append(ended)
    loaded, composed = (_median(answers) for answers in found.values())
    return {
        "rows": HUGE_ROWS,
        "private_mb": loaded["private_mb"],
        "private_mb_composed": composed["private_mb"],
        "seek_ms": loaded["seek_ms"],
    }


def _drop_from_page_cache(root: Path) -> None:
    """Drop the file from the page cache, as far as the system allows: the next read comes from the disk."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _is_whole(directory: Path) -> bool:
    """Whether shards of the current format exist."""
    try:
        ShardSet.open(directory).document_ends(0, 0, 1)
    except KhaError:
        return False
    return True


def _run_ours(
    root: Path, data: dict[str, Any], *, batch: int, everything: bool = False, composed: bool = False, **amount: Any
) -> dict[str, Any] | str:
    """Run our loader with these settings of `data`. It reads its configuration from a file, as a run saves it."""
    base = compose()
    config = replace(
        base,
        model=replace(base.model, vocab_size=VOCAB, seq_len=SEQ_LEN),
        data=replace(base.data, train=str(root / "ours"), global_batch_size=batch, **data),
        engine=replace(base.engine, micro_batch_size=1),
    )
    request = _request(root, "ours", batch=batch, **amount, everything=everything, composed=composed)
    (_scratch(root) / CONFIG).write_text(dump(config), encoding="utf-8")
    return _run(sys.executable, request | {"started": time.time()})


def _request(
    root: Path,
    loader: str,
    *,
    tokens: int,
    batch: int,
    cpu_seconds: float,
    only_prepare: bool = False,
    adapters: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    return {
        "loader": loader,
        "root": str(root),
        "adapters": None if adapters is None else str(adapters.resolve()),
        "shape": {"B": batch, "L": SEQ_LEN, "vocab": VOCAB},
        "options": options,
        "tokens": tokens,
        "cpu_seconds": cpu_seconds,
        "seek": [sample // batch for sample in ((NEAR, FAR) if loader == "ours" else (NEAR,))],
        "only_prepare": only_prepare,
        "started": time.time(),
    }


def write_tokens(root: Path, tokens: int, document_tokens: int) -> None:
    """Write the common tokens as our shards, from which each peer makes its own format."""
    generator = np.random.default_rng(0)
    prepare(root / "ours")
    size, entries = tokens // SHARDS, []
    for index in range(SHARDS):
        ids = generator.integers(0, 50_000, size, dtype=np.uint16)
        mean, count = np.log(document_tokens) - 0.5 * 1.2**2, 3 * size // document_tokens + 16
        lengths = np.maximum(1, generator.lognormal(mean, 1.2, count)).astype(np.int64)
        ends = np.cumsum(lengths)
        documents = np.split(ids, ends[ends < size])
        contents = ((part, len(part)) for part in documents)
        entries.append(write_shard(root / "ours", index, contents, vocab_size=VOCAB, dtype="uint16"))
    entry = TokenizerEntry("synthetic", VOCAB, "0" * 64, None, {}, (1,) * VOCAB)
    publish_dataset(root / "ours", entries, entry, dtype="uint16", corpus={"source": "benchmark"})


def write_sparse(root: Path) -> None:
    """Write a dataset of `HUGE_ROWS` rows that takes almost no disk space: files of zeros, one document per shard, with
    placeholder checksums.
    """
    directory, shards = root / "ours", 1000
    prepare(directory)
    tokens = HUGE_ROWS // shards * SEQ_LEN + 1
    ends = np.asarray([tokens], dtype="<i8").tobytes()
    sums = bytes(4 * -(-2 * tokens // CRC_BLOCK_BYTES)) + zlib.crc32(ends).to_bytes(4, "little") + ends
    written, entries = {"doc": ends, "crc": sums}, []
    for index in range(shards):
        name = f"shard-{index:05d}"
        with open(directory / f"{name}.tok", "wb") as file:
            file.truncate(2 * tokens)
        for suffix, data in written.items():
            first = directory / f"shard-00000.{suffix}"
            first.write_bytes(data) if index == 0 else os.link(first, directory / f"{name}.{suffix}")
        doc, crc = (
            FileEntry(f"{name}.{suffix}", len(data), hashlib.sha256(data).hexdigest())
            for suffix, data in written.items()
        )
        entries.append(ShardEntry(tokens, 1, 0, 0, 0, FileEntry(f"{name}.tok", 2 * tokens, "0" * 64), doc, crc))
    entry = TokenizerEntry("synthetic", VOCAB, "0" * 64, None, {}, (1,) * VOCAB)
    publish_dataset(directory, entries, entry, dtype="uint16", corpus={"source": "benchmark"})


def install_peers(directory: Path, groups: Sequence[tuple[str, ...]], say: Callable[[str], None]) -> str:
    """The interpreter of an environment with the same torch as ours and the packages of `groups`. Each group is
    installed by itself, so one that fails does not affect the others. Made once; failed installations are tried again
    at the next call.
    """
    python = directory / "bin" / "python"
    if not (directory / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        constraints = directory / "constraints.txt"
        # mosaicml-streaming needs NumPy below 2.2; one environment serves all.
        constraints.write_text(f"torch=={version('torch')}\nnumpy<2.2\n")
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
        failed = False
        for packages in (("torch", "numpy"), *groups):
            ended = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
            if ended.returncode:
                failed = True
                say(f"{packages[0]} does not install: {(ended.stderr.strip().splitlines() or ['?'])[-1]}")
        if not failed:
            (directory / "ready").touch()
    return str(python)


def _peer_versions(python: str, groups: Sequence[tuple[str, ...]]) -> dict[str, str]:
    ended = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=False)
    found = {one["name"]: one["version"] for one in json.loads(ended.stdout or "[]")}
    names = ["torch", "numpy", *(packages[0] for packages in groups)]
    return {name: found[name] for name in names if name in found}


def format_table(result: dict[str, Any]) -> str:
    """The figures as text."""
    about = result["protocol"]
    lines = _cold_lines(result["loaders"]) if about["cold"] else _warm_lines(result["loaders"], result["huge"])
    how = (
        f"documents of {about['document_tokens']} tokens, batches of {about['batch']} rows, "
        f"{about['rounds']} rounds of at most {about['cpu_seconds']} CPU seconds"
    )
    lines.append(f"{told(about)}; {how}")
    versions = ", ".join(f"{name} {found}" for name, found in about["peers"].items())
    lines.append(f"peers: {versions or 'none (--peers FOLDER)'}")
    return "\n".join([*lines, *(f"{name}: not measured: {why}" for name, why in result["missing"].items())])


def _warm_lines(figures: dict[str, dict[str, Any]], huge: dict[str, Any]) -> list[str]:
    """Each loader's speed, also as a multiple of the fastest peer's."""
    speeds = {name: f["million_tokens_per_cpu_second"] for name, f in figures.items()}
    fresh = {name: f["million_tokens_per_cpu_second_first_pass"] for name, f in figures.items()}
    peers = {name: speed for name, speed in speeds.items() if name not in (*NO_LOADERS, *OURS)}
    fastest = max(peers.values(), default=float("nan"))
    fastest_fresh = max((fresh[name] for name in peers), default=float("nan"))
    speed_heads = f"{'M tok/CPU-s':>12}{'x peer':>8}{'1st pass':>10}{'x peer':>8}"
    lines = [f"{'loader':<42}{speed_heads}{'CPU s':>8}{'M tok/s':>9}{'first s':>9}{'MB':>6}  seek ms"]
    for name, f in figures.items():
        seek = " ".join(f"{ms:.2f}" for ms in f["seek_ms"]) or "-"
        lines.append(
            f"{name:<42}{speeds[name]:>12.0f}{speeds[name] / fastest:>8.2f}"
            f"{fresh[name]:>10.0f}{fresh[name] / fastest_fresh:>8.2f}{f['cpu_seconds_for_all_tokens']:>8.2f}"
            f"{f['million_tokens_per_second']:>9.0f}{f['seconds_to_first_batch']:>9.1f}{f['private_mb']:>6.0f}  {seek}"
        )
    for name in [name for name in ("ours", "ours, pread") if name in speeds]:
        ratios = "; ".join(f"{peer} {speeds[name] / speed:.1f}" for peer, speed in peers.items())
        lines.append(f"{name}, times the speed of a peer at the same work: {ratios}")
    seek = " and ".join(f"{ms:.2f}" for ms in huge["seek_ms"])
    lines.append(
        f"ours at {huge['rows']:,} rows: {huge['private_mb']:.1f} MB over importing torch "
        f"({huge['private_mb_composed']:.1f} where Hydra composes the configuration), "
        f"{seek} ms to seek to samples {NEAR:,} and {FAR:,}"
    )
    return lines


def _cold_lines(figures: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'loader':<42}{'M tok/s':>9}{'bytes from disk a token':>26}{'first s':>9}"]
    for name, f in figures.items():
        lines.append(
            f"{name:<42}{f['million_tokens_per_second_at_start']:>9.1f}{f['disk_bytes_per_token_at_start']:>26.1f}"
            f"{f['seconds_to_first_batch']:>9.1f}"
        )
    return lines


def _run(python: str, request: dict[str, Any]) -> dict[str, Any] | str:
    """The worker's result, or the last line of its error output."""
    scratch = _scratch(Path(request["root"]))
    # Peers clean up the directory where they expect their temporary files, so it is this one. -P: none of our files
    # shadows a module.
    places = dict.fromkeys(("HOME", "TMPDIR", "DATA_OPTIMIZER_CACHE_FOLDER"), str(scratch))
    environment = {**os.environ, **places, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(
            [python, "-P", "-m", "kha_train.bench.loaders"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no answer within 300 s"
    lines = ended.stderr.strip().splitlines()
    return json.loads(ended.stdout) if ended.stdout else (lines[-1] if lines else f"exit {ended.returncode}")


def _scratch(root: Path) -> Path:
    directory = root / "scratch"
    directory.mkdir(exist_ok=True)
    return directory


def _median(figures: list[dict[str, Any]]) -> dict[str, Any]:
    keys = (
        "million_tokens_per_cpu_second",
        "million_tokens_per_cpu_second_first_pass",
        "million_tokens_per_second",
        "million_tokens_per_second_at_start",
        "disk_bytes_per_token_at_start",
        "cpu_seconds_for_all_tokens",
        "seconds_to_first_batch",
        "private_mb",
    )
    seek = [statistics.median(column) for column in zip(*(one["seek_ms"] for one in figures), strict=True)]
    return {key: statistics.median(one[key] for one in figures) for key in keys} | {"seek_ms": seek}
