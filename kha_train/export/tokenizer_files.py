"""The tokenizer of an export: the files that transformers reads, and held-out lines on which its ids are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.config.schema import RunConfig
from kha_train.data.format.shards import ShardSet
from kha_train.data.sources import open_shards
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_conversion import tokenizer_json
from kha_train.data.tokenizer_kinds import dataset_tokenizer, open_tokenizer
from kha_train.errors import ConfigError, Options, either
from kha_train.export.verification import Text
from kha_train.foreign.files import read_regular
from kha_train.record.files import write_json

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
LINES = 1000
MOST_BYTES = 2**30
_IDS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Wanted:
    """What the user says of the tokenizer: its `file` and held-out `lines`, instead of those of the run's validation
    set; or that the export has `none`.
    """

    file: Path | None = None
    lines: Path | None = None
    none: bool = False


@dataclass(frozen=True)
class Speech:
    """The content of an export's tokenizer.json (empty: it has none), the ids of special tokens by name, and held-out
    text.
    """

    content: bytes
    special_ids: dict[str, int]
    text: Text

    def config(self) -> dict[str, int]:
        """The keys of config.json and generation_config.json."""
        return {
            f"{name}_token_id": self.special_ids[name] for name in ("bos", "eos", "pad") if name in self.special_ids
        }


def speech_of(config: RunConfig, wanted: Wanted) -> Speech:
    """The tokenizer of a run and lines to compare it on: of its validation set, unless `wanted` names others.

    Raises ConfigError when there are no such files or no text, and as `open_shards`, `open_tokenizer` and
    `tokenizer_json`.
    """
    if wanted.none:
        return Speech(b"", {}, Text())
    if wanted.file is not None and wanted.lines is not None:
        tokenizer: Tokenizer | None = (named := open_tokenizer(wanted.file))
        special_ids = dict(named.special_ids)
        lines: Iterable[str] = _lines_of(wanted.lines)
    else:
        shards = _held_out(config)
        tokenizer = dataset_tokenizer(shards) if wanted.file is None else open_tokenizer(wanted.file)
        special_ids = {**shards.manifest.tokenizer.special_ids, **(tokenizer.special_ids if tokenizer else {})}
        lines = _lines_of(wanted.lines) if wanted.lines else _lines_in(shards, tokenizer)
    if tokenizer is None:
        return Speech(b"", special_ids, Text())
    if tokenizer.vocab_size > config.model.vocab_size:
        problem = f"has {tokenizer.vocab_size} ids, and the model {config.model.vocab_size}"
        raise ConfigError(problem, field="tokenizer", value=str(tokenizer.path))
    raw = tokenizer.path.read_bytes()
    content = raw if tokenizer.file_name == FILE else tokenizer_json(raw)
    # transformers takes the name of a special token in a text for that token.
    names = [entry["content"] for entry in _added(content) if entry["special"]]
    kept = list(islice((line for line in lines if line and not any(name in line for name in names)), LINES))
    if not kept:
        raise ConfigError("no held-out line to compare ids on", field="--lines", fix="name a text file: --lines FILE")
    return Speech(content, special_ids, Text(kept, [ids.tolist() for ids in tokenizer.encode(kept)]))


def write_tokenizer(directory: Path, speech: Speech, longest: int) -> None:
    """Write the files of the tokenizer, if there is one, for a model of rows of `longest` tokens. Raises OSError."""
    if not speech.content:
        return
    (directory / FILE).write_bytes(speech.content)
    spelled = {entry["id"]: entry["content"] for entry in _added(speech.content)}
    special = {f"{name}_token": spelled[number] for name, number in speech.special_ids.items() if number in spelled}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    write_json(directory / CONFIG_FILE, settings)


def _added(content: bytes) -> list[dict[str, Any]]:
    """The tokens that tokenizer.json lists beside its model."""
    found: list[dict[str, Any]] = json.loads(content).get("added_tokens", [])
    return found


def _held_out(config: RunConfig) -> ShardSet:
    """The validation set of a run. Raises ConfigError, with the ways out, when it is not where it was."""
    try:
        return open_shards(config, config.data.validation, "data.validation")
    except ConfigError as error:
        fix = either("name the tokenizer and held-out text: --tokenizer FILE --lines FILE", Options("--no-tokenizer"))
        raise ConfigError(error.problem, field=error.field, value=error.value, fix=fix) from error


def _lines_in(shards: ShardSet, tokenizer: Tokenizer | None) -> Iterator[str]:
    """The lines of a dataset's documents, from its beginning; the last one of each stretch that is read, which may end
    in the next one, is left out.
    """
    if tokenizer is None:
        return
    end = tokenizer.special_ids.get("eos", -1)
    for number, shard in enumerate(shards.manifest.shards):
        for start in range(0, shard.tokens, _IDS_AT_ONCE):
            ids = shards.read(number, start, min(_IDS_AT_ONCE, shard.tokens - start))
            *documents, rest = np.split(ids, np.flatnonzero(ids == end) + 1)
            for document in documents:
                yield from tokenizer.decode(document.tolist()).split("\n")
            yield from tokenizer.decode(rest.tolist()).split("\n")[:-1]


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file. Raises ConfigError when there is none, or it is no text."""
    raw = read_regular(path, MOST_BYTES, ConfigError)
    if raw is None:
        raise ConfigError("no such file", field="--lines", value=str(path))
    try:
        return raw.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", field="--lines", value=str(path)) from error
