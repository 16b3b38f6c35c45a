"""Tokenizing a corpus into the datasets `train/` and `validation/` of one directory.

The plan comes first: a split's file is cut at line ends into byte ranges, one a shard, without looking at tokens. Each
range is then encoded on its own, so any number of processes writes the same files. Every document ends with the
tokenizer's end-of-sequence id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.corpus import DESCRIPTION_NAME, SPLITS, parse_line, split_path
from kha_train.data.canonical import canonical_json, sha256_of_file
from kha_train.data.manifest import Manifest, ShardEntry, dtype_for
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.writer import (
    finished_shards,
    mark_finished,
    prepare,
    publish_dataset,
    refuse_existing,
    write_shard,
)
from kha_train.errors import ConfigError, DataError

SHARD_BYTES = 512 << 20
ENCODERS = ("sentencepiece", "gigatoken")
SAMPLE_BYTES = 2 << 20
_BATCH_CHARACTERS = 1 << 20


class ShardPlan(NamedTuple):
    """Which lines make a shard: the bytes [start, stop) of a JSONL file, whose first line has number `line`."""

    index: int
    start: int
    stop: int
    line: int


class _Task(NamedTuple):
    """What all shards of a split have in common."""

    path: Path
    tokenizer: Path
    directory: Path
    dtype: str
    identity: str
    fast: bool


def encode_corpus(
    corpus: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    encoder: str = ENCODERS[0],
    say: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Manifest]:
    """Write `out/train` and `out/validation` from a corpus directory; returns the manifest of each split.

    A shard holds the documents of about `shard_bytes` of JSONL, and always whole documents. `progress` gets bytes of
    JSONL. `encoder` is one of `ENCODERS`; gigatoken is used once its ids were proven equal to sentencepiece's on the
    first documents, and `say` is told what is used and why. An encoding that was interrupted goes on with the shards
    that are not finished. Raises ConfigError for a missing corpus or tokenizer, an encoder that is not there and for
    existing datasets unless `overwrite`; DataError for a bad line or a split without text.
    """
    paths = {split: split_path(corpus, split) for split in SPLITS}
    loaded = choose_encoder(Tokenizer(tokenizer), encoder, paths["train"], say or (lambda text: None))
    if "eos" not in loaded.special_ids:
        raise ConfigError("has no end-of-sequence id", field="tokenizer", value=str(tokenizer))
    plans = {split: plan_shards(path, shard_bytes) for split, path in paths.items()}
    for split in SPLITS:
        if not plans[split]:
            raise ConfigError(
                "has no document",
                field="corpus",
                value=str(paths[split]),
                fix="validation gets 2 % of the paths: add documents, or move lines between the two files yourself",
            )
    if not overwrite:
        for split in SPLITS:
            refuse_existing(Path(out) / split)
    return {
        split: _encode_split(plans[split], path, loaded, Path(out) / split, workers, overwrite, progress)
        for split, path in paths.items()
    }


def choose_encoder(tokenizer: Tokenizer, encoder: str, path: Path, say: Callable[[str], None]) -> Tokenizer:
    """`tokenizer`, or one that gives the same ids faster, proven on the first `SAMPLE_BYTES` of the JSONL file `path`.

    `say` is told which, and why. Raises ConfigError for an unknown encoder or one that is not installed.
    """
    if encoder not in ENCODERS:
        raise ConfigError("no such encoder", field="encoder", value=encoder, allowed=", ".join(ENCODERS))
    if encoder == ENCODERS[0]:
        return tokenizer
    fast = Tokenizer(tokenizer.path, fast=True)
    documents, size = 0, path.stat().st_size
    sample = ShardPlan(0, 0, min(SAMPLE_BYTES, size), 1)
    for texts, _ in _batches(sample, path):
        try:
            same = all(map(np.array_equal, fast.encode(texts), tokenizer.encode(texts)))
        except DataError:
            same = False
        if not same:
            say(f"sentencepiece, because {fast.encoder} gives other ids in the first documents")
            return tokenizer
        documents += len(texts)
    say(f"{fast.encoder}: the same ids as sentencepiece in the first {documents} documents")
    return fast


def plan_shards(path: Path, shard_bytes: int) -> list[ShardPlan]:
    """Cut a JSONL file into shards of about `shard_bytes`, each closed at the first line end at or after that size."""
    plans: list[ShardPlan] = []
    start, line, position = 0, 1, 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            position += len(text)
            if position - start >= shard_bytes:
                plans.append(ShardPlan(len(plans), start, position, line))
                start, line = position, number + 1
    if position > start:
        plans.append(ShardPlan(len(plans), start, position, line))
    return plans


def _encode_split(
    plans: list[ShardPlan],
    path: Path,
    tokenizer: Tokenizer,
    directory: Path,
    workers: int,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> Manifest:
    fingerprint = _fingerprint(path)
    identity = _identity(fingerprint["sha256"], tokenizer, plans)
    done = finished_shards(directory, identity)
    prepare(directory, overwrite=overwrite, keep=done)
    fast = tokenizer.encoder != ENCODERS[0]
    task = _Task(path, tokenizer.path, directory, dtype_for(tokenizer.vocab_size), identity, fast)
    todo = [plan for plan in plans if plan.index not in done]
    if progress is not None:
        progress(sum(plan.stop - plan.start for plan in plans if plan.index in done))
    if workers == 1:
        done |= {plan.index: _encode_shard(plan, task, tokenizer, progress) for plan in todo}
    else:
        done |= _encode_in_processes(todo, task, workers, progress)
    shards = [done[plan.index] for plan in plans]
    return publish_dataset(
        directory,
        shards,
        tokenizer.entry(),
        dtype=task.dtype,
        corpus=fingerprint,
        tokenizer_file=tokenizer.path,
        encoder=tokenizer.encoder,
    )


def _identity(text_sha256: str, tokenizer: Tokenizer, plans: list[ShardPlan]) -> str:
    """What decides every byte of the shards: finished ones of the same identity need not be written again."""
    parts = [text_sha256, tokenizer.sha256, tokenizer.encoder, [list(plan) for plan in plans]]
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _encode_in_processes(
    plans: list[ShardPlan], task: _Task, workers: int, progress: Callable[[int], None] | None
) -> dict[int, ShardEntry | None]:
    shards = {}
    # A forked child would inherit the threads of whatever the caller has loaded.
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        for plan, shard in zip(plans, pool.map(partial(_encode_shard_alone, task=task), plans), strict=True):
            shards[plan.index] = shard
            if progress is not None:
                progress(plan.stop - plan.start)
    return shards


def _encode_shard_alone(plan: ShardPlan, task: _Task) -> ShardEntry | None:
    return _encode_shard(plan, task, Tokenizer(task.tokenizer, fast=task.fast), None)


def _encode_shard(
    plan: ShardPlan, task: _Task, tokenizer: Tokenizer, progress: Callable[[int], None] | None
) -> ShardEntry | None:
    documents = _encoded_documents(plan, task.path, tokenizer, progress)
    shard = write_shard(task.directory, plan.index, documents, vocab_size=tokenizer.vocab_size, dtype=task.dtype)
    mark_finished(task.directory, plan.index, shard, task.identity)
    return shard


def _encoded_documents(
    plan: ShardPlan, path: Path, tokenizer: Tokenizer, progress: Callable[[int], None] | None
) -> Iterator[tuple[np.ndarray, int]]:
    end = np.asarray([tokenizer.special_ids["eos"]], dtype=np.int32)
    for texts, line_bytes in _batches(plan, path):
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
            yield np.concatenate((ids, end)), len(text.encode())
        if progress is not None:
            progress(line_bytes)


def _batches(plan: ShardPlan, path: Path) -> Iterator[tuple[list[str], int]]:
    """The texts of the plan's lines in batches of about a million characters, with the bytes of their lines."""
    texts: list[str] = []
    characters, line_bytes = 0, 0
    with open(path, "rb") as file:
        file.seek(plan.start)
        number = plan.line
        while file.tell() < plan.stop:
            line = file.readline()
            line_bytes += len(line)
            if line.strip():
                text = parse_line(line, f"{path.name}:{number}", path).text
                if text:
                    texts.append(text)
                    characters += len(text)
            number += 1
            if characters >= _BATCH_CHARACTERS:
                yield texts, line_bytes
                texts, characters, line_bytes = [], 0, 0
    yield texts, line_bytes


def _fingerprint(path: Path) -> dict[str, Any]:
    """What the manifest says about the text: the hash of the file encoded, and the corpus's own description."""
    description = path.with_name(DESCRIPTION_NAME)
    try:
        own = json.loads(description.read_bytes()) if description.is_file() else {}
    except ValueError as error:
        raise DataError(
            f"is not JSON: {error}", field=str(description), fix="delete it, or build the corpus"
        ) from error
    return {"split": path.stem, "sha256": sha256_of_file(path), "corpus": own}
