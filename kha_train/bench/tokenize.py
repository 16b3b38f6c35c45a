"""Measures encoding of text into shards, with one process and with several, beside the tokenizer library alone.

The text is a part of Python's standard library; the tokenizer has 4096 pieces and was trained on it. `library` encodes
the texts from memory and discards the ids: the shards add the cost of reading, checking and writing. In every round
several processes are spawned anew, and their start-up time counts.
"""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from data_tools.corpus import build_corpus, read_split
from data_tools.encode import encode_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.bench import protocol
from kha_train.data.tokenizer_kinds import open_tokenizer

PACKAGES = ("asyncio", "concurrent", "email", "encodings", "http", "importlib", "json", "logging", "unittest", "xml")
VOCAB_SIZE = 4096


def measure(processes: int, rounds: int) -> dict[str, Any]:
    """Bytes and tokens per second by arm, and the cost of each relative to one process."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        library = Path(sysconfig.get_paths()["stdlib"])
        about = build_corpus(root / "corpus", standard_library=False, extra_roots=[library / name for name in PACKAGES])
        tokenizer = train_tokenizer(root / "corpus", root / "model", vocab_size=VOCAB_SIZE, max_bytes=1_000_000)
        texts = [document.text for split in ("train", "validation") for document in read_split(root / "corpus", split)]
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(len(ids) for ids in tokenizer.encode(texts))
        arms = {
            "1 process": lambda: _shards(root, 1, size),
            "library": lambda: open_tokenizer(root / "model").encode(texts),
        }
        if processes > 1:
            arms[f"{processes} processes"] = lambda: _shards(root, processes, size)
        device = torch.device("cpu")
        seconds = protocol.interleave(arms, blocks=rounds, device=device)
        environment = protocol.environment(device)
    return {
        "text": {"bytes": size, "tokens": tokens, "documents": len(texts), "skipped": about["not_utf8"]},
        "protocol": {"blocks": rounds, "clock": "wall"},
        "environment": environment,
        "arms": {name: _figures(taken, seconds["1 process"], size, tokens) for name, taken in seconds.items()},
    }


def format_measured(found: dict[str, Any]) -> str:
    """The figures and their protocol, as text."""
    text = found["text"]
    lines = [
        f"{text['bytes']:,} bytes, {text['documents']:,} documents, {text['tokens']:,} tokens; "
        + f"{found['protocol']['blocks']} interleaved rounds, medians; {protocol.told(found['environment'])}"
    ]
    for name, arm in found["arms"].items():
        ratio = arm["against_base"]
        lines.append(
            f"  {name:<12} {arm['seconds']:7.2f} s  {arm['bytes_per_second'] / 1e6:6.2f} MB/s  "
            f"{arm['tokens_per_second']:,.0f} tokens/s  {protocol.shown(ratio, found['protocol']['blocks'])}"
        )
    return "\n".join(lines)


def _shards(root: Path, workers: int, size: int) -> None:
    """Starts from nothing, because a finished encoding would not be repeated."""
    shutil.rmtree(root / "shards", ignore_errors=True)
    encode_corpus(
        root / "corpus", root / "model", root / "shards", workers=workers, shard_bytes=max(size // workers, 1)
    )


def _figures(seconds: list[float], base: list[float], size: int, tokens: int) -> dict[str, Any]:
    taken = protocol.timing(seconds)
    return {
        **protocol.plain(taken),
        "against_base": protocol.plain(protocol.compare(seconds, base)),
        "bytes_per_second": size / taken.seconds,
        "tokens_per_second": tokens / taken.seconds,
    }
