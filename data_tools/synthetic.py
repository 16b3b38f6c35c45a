"""A seeded source of structured integers: small datasets for tests, the same on every machine, without any text.

A document counts upwards by its own step size and sometimes jumps, so that a model can learn something. Lengths are
log-uniform: many documents of a few tokens, a few of thousands. Every document ends with id 0, which stands for no
text; every other id stands for one byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kha_train.data.format.canonical import canonical_json
from kha_train.data.format.manifest import Manifest, TokenizerEntry, dtype_for
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.sampling.order import keyed_hash

END_ID = 0
_STEP_SIZES = 8
_JUMP_ONE_IN = 16


def write_dataset(
    directory: str | Path,
    *,
    vocab_size: int,
    documents: int,
    seed: int = 0,
    validation_documents: int | None = None,
    max_length: int = 2048,
    documents_per_shard: int = 64,
) -> tuple[Manifest, Manifest]:
    """Write `directory/train` and `directory/validation`, replacing existing ones; returns their manifests.

    `validation_documents` is a tenth of `documents` (at least 16) unless given; `max_length` bounds a document's
    tokens. The mean length is about 280 tokens at 2048. Raises DataError when `documents` is 0.
    """
    assert vocab_size >= 2, vocab_size
    if validation_documents is None:
        validation_documents = max(16, documents // 10)
    splits = (("train", documents, 2 * seed), ("validation", validation_documents, 2 * seed + 1))
    first, second = (
        _write_split(Path(directory) / name, vocab_size, count, key, max_length, documents_per_shard)
        for name, count, key in splits
    )
    return first, second


def _write_split(
    directory: Path, vocab_size: int, documents: int, key: int, max_length: int, documents_per_shard: int
) -> Manifest:
    prepare(directory)
    dtype = dtype_for(vocab_size)
    shards = []
    for index, first in enumerate(range(0, documents, documents_per_shard)):
        numbers = range(first, min(first + documents_per_shard, documents))
        contents = ((ids, len(ids) - 1) for ids in generate(numbers, vocab_size, key, max_length))
        shards.append(write_shard(directory, index, contents, vocab_size=vocab_size, dtype=dtype))
    identity = {"kind": "synthetic", "vocab": vocab_size}
    tokenizer = TokenizerEntry(
        kind="synthetic",
        vocab=vocab_size,
        sha256=hashlib.sha256(canonical_json(identity)).hexdigest(),
        file=None,
        special_ids={"eos": END_ID},
        bytes_per_id=(0, *[1] * (vocab_size - 1)),
    )
    corpus = {"source": "synthetic", "documents": documents, "key": key, "max_length": max_length}
    return publish_dataset(directory, shards, tokenizer, dtype=dtype, corpus=corpus)


def generate(numbers: range, vocab_size: int, key: int, max_length: int) -> Iterator[np.ndarray]:
    """The documents with the given numbers, int64 ids; each a pure function of (number, vocabulary, key, length)."""
    sizes = max(1, (max_length - 1).bit_length())
    for number in numbers:
        traits = keyed_hash(np.arange(4, dtype=np.uint64), np.uint64(key * 1_000_003 + number)).tolist()
        scale = 1 << traits[0] % sizes
        length = min(max_length, scale + traits[1] % scale)
        noise = keyed_hash(np.arange(length, dtype=np.uint64), np.uint64(traits[2]))
        jumps = np.where(noise % np.uint64(_JUMP_ONE_IN) == 0, noise >> np.uint64(8), np.uint64(0))
        jumps = (jumps % np.uint64(vocab_size)).astype(np.int64)
        ids = 1 + (np.cumsum(1 + traits[3] % _STEP_SIZES + jumps) % (vocab_size - 1))
        ids[-1] = END_ID
        yield ids
