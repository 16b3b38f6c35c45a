"""Opens the tokenizer of a file or of a dataset, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from kha_train.config.first_steps import quickstart_first
from kha_train.data.format.shards import ShardSet
from kha_train.data.sentencepiece_model import SentencePiece
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_json import TokenizerJson
from kha_train.errors import ConfigError

KINDS: tuple[type[TokenizerJson | SentencePiece], ...] = (TokenizerJson, SentencePiece)
"""The kinds of tokenizers; the first that claims a file opens it."""
FILE_NAMES = tuple(kind.file_name for kind in KINDS)
"""Their file names in a dataset, or in a directory that holds a model."""


def open_tokenizer(path: str | Path, *, threads: int | None = None) -> Tokenizer:
    """The tokenizer in the file `path`, or in the directory `path`. `threads` are those of its library (None: one per
    core).

    Raises ConfigError when there is none, when the file is damaged or of no known kind, and when it would lose text.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FILE_NAMES if (path / name).is_file()), path)
    if not path.is_file():
        fix = quickstart_first(path) or "`kha data tokenizer` trains one"
        raise ConfigError("no such file", field="tokenizer", value=str(path), fix=fix)
    kind = next(kind for kind in KINDS if kind.claims(path))
    return kind(path, threads=threads)


def dataset_tokenizer(shards: ShardSet) -> Tokenizer | None:
    """The tokenizer that made a dataset, with the special ids of its manifest; None where the dataset has none
    (synthetic or imported ids). Raises DataError as `ShardSet.check_tokenizer`, and ConfigError as `open_tokenizer`.
    """
    path, entry = shards.check_tokenizer(), shards.manifest.tokenizer
    if path is None or entry.kind not in (kind.kind for kind in KINDS):
        return None
    return open_tokenizer(path).with_special_ids(entry.special_ids).padded(entry.vocab)


def chosen_tokenizer(path: str | Path, eos: str = "", vocab_size: int = 0) -> Tokenizer:
    """The tokenizer at `path`, whose documents end with the token `eos` (empty: as its file says), for a model with
    `vocab_size` ids (0: as many as the tokenizer has). Raises ConfigError as `open_tokenizer`, for an unknown token,
    and for a model with fewer ids.
    """
    tokenizer = open_tokenizer(path)
    if eos:
        number = tokenizer.id_of(eos)
        if number is None:
            raise ConfigError("the tokenizer has no such token", field="eos", value=eos)
        tokenizer = tokenizer.with_special_ids({"eos": number})
    return tokenizer.padded(vocab_size or tokenizer.vocab_size)
