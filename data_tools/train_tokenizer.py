"""Trains the tokenizer on a corpus's training split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from data_tools.corpus import read_split
from kha_train.data.sentencepiece_model import SentencePiece, train
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_conversion import tokenizer_json
from kha_train.data.tokenizer_json import TokenizerJson
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
    """Train on the corpus directory's training documents and write the model file `out`: a sentencepiece model, or the
    same tokenizer as a `tokenizer.json` where the name ends with .json.

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

    path = Path(out)
    if not TokenizerJson.claims(path):
        return train(texts(), path, vocab_size=vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".training-", dir=path.parent) as beside:
        model = train(texts(), Path(beside) / SentencePiece.file_name, vocab_size=vocab_size)
        (Path(beside) / path.name).write_bytes(tokenizer_json(model.path.read_bytes()))
        os.replace(Path(beside) / path.name, path)
    return TokenizerJson(path)
