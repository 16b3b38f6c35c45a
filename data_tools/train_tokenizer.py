"""Trains the tokenizer on a corpus's training split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data_tools.corpus import read_split
from kha_train.data.sentencepiece_model import train
from kha_train.data.tokenizer import Tokenizer
from kha_train.errors import ConfigError, Options


def train_tokenizer(
    corpus: str | Path,
    out: str | Path,
    *,
    vocab_size: int,
    max_bytes: int = 0,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Train on the corpus directory's training documents and write the model file `out`.

    Reading stops after `max_bytes` of text (0: all of it); `progress` receives the bytes of text as they are read.
    Raises ConfigError when there is no corpus, when its text cannot give exactly `vocab_size` pieces, and for an
    existing file unless `overwrite`.
    """
    if Path(out).exists() and not overwrite:
        raise ConfigError("already exists", field="out", value=str(out), fix=Options("--overwrite", "pass {}"))

    def texts() -> Iterator[str]:
        """The texts to train on."""
        total = 0
        for document in read_split(corpus, "train"):
            if max_bytes and total >= max_bytes:
                return
            size = len(document.text.encode())
            total += size
            if progress is not None:
                progress(size)
            yield document.text

    return train(texts(), Path(out), vocab_size=vocab_size)
