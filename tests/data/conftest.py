"""A small dataset and a configuration over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus import build_corpus
from data_tools.encode import encode_corpus
from data_tools.synthetic import write_dataset
from data_tools.train_tokenizer import train_tokenizer
from kha_train.config import schema
from kha_train.config.compose import compose

VOCAB = 97


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ (several shards) and validation/ of documents of 1 to 600 tokens; do not change it."""
    directory = tmp_path_factory.mktemp("dataset")
    write_dataset(directory, vocab_size=VOCAB, documents=150, seed=4, max_length=600, documents_per_shard=40)
    return directory


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., schema.RunConfig]:
    """`make_config(directory, seq_len=..., batch=..., ...)`: what the data side needs of one; further arguments are
    fields of `DataSection`."""
    base, cache = compose(), str(tmp_path_factory.mktemp("cache"))

    def make(
        directory: Path,
        *,
        seq_len: int = 32,
        batch: int = 24,
        micro: int = 2,
        seed: int = 0,
        rows: int = 0,
        vocab: int = VOCAB,
        isolate: bool = True,
        **data: Any,
    ) -> schema.RunConfig:
        fields = {"train": str(directory / "train"), "validation": str(directory / "validation")}
        fields |= {"cache_dir": cache, **data}
        return replace(
            base,
            run=replace(base.run, seed=seed),
            model=replace(base.model, vocab_size=vocab, seq_len=seq_len),
            data=schema.DataSection(name="shards", global_batch_size=batch, isolate_documents=isolate, **fields),
            engine=replace(base.engine, micro_batch_size=micro),
            validation=replace(base.validation, rows=rows),
        )

    return make


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with corpus/, tokenizer.model, train/ and validation/ made of a little text; do not change it."""
    directory = tmp_path_factory.mktemp("text")
    source = directory / "notes"
    source.mkdir()
    for number in range(120):
        words = [f"word{(number * 7 + i * i) % 50}" for i in range(1 + number * 13 % 97)]
        (source / f"{number:03d}.txt").write_text(" ".join(words) + f"\n\tnumber {number}: naïve ▁ Grüße\r\n")
    build_corpus(directory / "corpus", standard_library=False, extra_roots=[source])
    train_tokenizer(directory / "corpus", directory / "tokenizer.model", vocab_size=320)
    encode_corpus(directory / "corpus", directory / "tokenizer.model", directory)
    return directory
