"""Datasets of synthetic tasks: train and validation shards of documents whose answers a program can work out.

`task_documents.py` makes the documents. A document belongs to validation if its CRC-32 modulo 8 is 0, and to training
otherwise, so no document is in both; documents are drawn until one belongs where it is needed. Facts to memorise are
the exception, because validation asks for the facts that training told.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from data_tools.staging import replaced
from data_tools.task_documents import (
    ANSWER,
    FIRST_END,
    FIRST_SYMBOL,
    MARKS,
    MOST_LEVELS,
    SUBJECT,
    TASKS,
    Draws,
    begin_id,
    names,
)
from kha_train.data.format.canonical import canonical_json, canonical_sha256
from kha_train.data.format.manifest import Manifest, TokenizerEntry, dtype_for
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.errors import ConfigError, between

KIND = "synthetic tasks"
DOCUMENTS, VALIDATION_DOCUMENTS, VOCAB_SIZE = 20_000, 1_000, 256
_SPLIT_IN = 8
_PER_SHARD = 1 << 14
_ATTEMPTS = 500
"""The chance that none of so many different documents belongs to validation is below 1e-28."""


@dataclass(frozen=True)
class Order:
    """What to write: a `task` of `TASKS`, `documents` for training and `validation_documents`.

    `levels` and `symbols` are the task's own unless they are given; documents have the levels in turn. All datasets of
    one `vocab_size` share a tokenizer, so that one model can train on a mixture of tasks. `complete` checks an order.
    """

    task: str
    documents: int = DOCUMENTS
    validation_documents: int = VALIDATION_DOCUMENTS
    levels: tuple[int, ...] = ()
    symbols: int = 0
    vocab_size: int = VOCAB_SIZE
    seed: int = 0

    def complete(self) -> Order:
        """The same with every default filled in. Raises ConfigError for what the task cannot have."""
        if self.task not in TASKS:
            raise ConfigError("unknown task", field="task", value=self.task, allowed=", ".join(TASKS))
        task, room = TASKS[self.task], self.vocab_size - FIRST_SYMBOL
        symbols = self.symbols or min(task.symbols, room)
        lowest = task.symbols if task.digits else task.fewest_symbols
        if room < lowest or self.vocab_size > 1 << 20:
            allowed = between(FIRST_SYMBOL + lowest, 1 << 20)
            raise ConfigError("does not fit the task", field="--vocab-size", value=self.vocab_size, allowed=allowed)
        highest = task.symbols if task.digits else room
        if not lowest <= symbols <= highest:
            problem = f"{self.task} cannot use so many symbols in a vocabulary of {self.vocab_size}"
            raise ConfigError(problem, field="--symbols", value=symbols, allowed=between(lowest, highest))
        levels, most = self.levels or task.levels, task.most(symbols)
        if len(levels) > MOST_LEVELS or any(low >= high for low, high in pairwise(levels)):
            allowed = f"up to {MOST_LEVELS} ascending numbers"
            raise ConfigError("levels do not ascend", field="--levels", value=list(levels), allowed=allowed)
        if not task.least <= levels[0] <= levels[-1] <= most:
            problem = f"{self.task} has no such level ({task.level})"
            raise ConfigError(problem, field="--levels", value=list(levels), allowed=between(task.least, most))
        if task.memorised and not len(levels) * levels[-1] <= self.documents <= symbols**SUBJECT:
            allowed = between(len(levels) * levels[-1], symbols**SUBJECT)
            raise ConfigError("too few or too many to tell", field="--documents", value=self.documents, allowed=allowed)
        return replace(self, levels=levels, symbols=symbols)


def write_task(
    order: Order, out: Path, *, overwrite: bool = False, progress: Callable[[int], None] = lambda written: None
) -> dict[str, Manifest]:
    """Write `out/train` and `out/validation` of a complete `order`; returns their manifests. `progress` is called for
    documents as they are written.

    Raises ConfigError for existing datasets unless `overwrite`, as `replaced`, and when a level has too few different
    documents for two splits.
    """
    counts = {"train": order.documents, "validation": order.validation_documents}
    places = {split: out / split for split in counts}
    with replaced(places, canonical_sha256(vars(order)), overwrite=overwrite, keep=False) as directories:
        return {
            split: _write_split(directories[split], order, split, amount, progress) for split, amount in counts.items()
        }


def _write_split(directory: Path, order: Order, split: str, amount: int, progress: Callable[[int], None]) -> Manifest:
    prepare(directory)
    shards, longest = [], 0
    dtype = dtype_for(order.vocab_size)
    for index, first in enumerate(range(0, amount, _PER_SHARD)):
        numbers = range(first, min(first + _PER_SHARD, amount))
        documents = list(generate(order, split, numbers))
        longest = max(longest, *map(len, documents))
        contents = ((ids, len(ids) - 2) for ids in documents)
        shards.append(write_shard(directory, index, contents, vocab_size=order.vocab_size, dtype=dtype))
        progress(len(numbers))
    corpus = {
        "source": KIND,
        "split": split,
        **vars(order),
        "levels": [*order.levels],
        "longest": longest,
        "answers": _reading(order),
    }
    corpus["tokens"] = " ".join(names(order.vocab_size))
    return publish_dataset(directory, shards, _tokenizer(order.vocab_size), dtype=dtype, corpus=corpus)


def _reading(order: Order) -> dict[str, object]:
    """How the task `answers` finds answers and levels in the ids."""
    levels = {str(FIRST_END + index): level for index, level in enumerate(order.levels)}
    return {
        "begin": begin_id(order.task),
        "mark": ANSWER,
        "first_symbol": FIRST_SYMBOL,
        "ends": levels,
        "level": TASKS[order.task].level,
    }


def _tokenizer(vocab_size: int) -> TokenizerEntry:
    """One for all tasks. A symbol and a mark inside a document count as a byte of text, so that bits per byte exist."""
    identity = {"kind": KIND, "vocab": vocab_size, "marks": MARKS, "first": [FIRST_END, FIRST_SYMBOL]}
    silent = {0, *range(FIRST_END, FIRST_SYMBOL)}
    return TokenizerEntry(
        kind=KIND,
        vocab=vocab_size,
        sha256=hashlib.sha256(canonical_json(identity)).hexdigest(),
        file=None,
        special_ids={"pad": 0},
        bytes_per_id=tuple(int(number not in silent) for number in range(vocab_size)),
    )


def generate(order: Order, split: str, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The documents of a complete `order` with the given numbers, int64 ids; each a pure function of order, split and
    number. Raises ConfigError when a level has too few different documents."""
    task = TASKS[order.task]
    facts = list(accumulate(_facts_of(order), initial=0))
    for number in numbers:
        index, place = divmod(number, len(order.levels))
        if task.memorised:
            fact = facts[place] + index % (facts[place + 1] - facts[place])
            yield _document(order, place, fact, Draws(order.task, order.seed, fact))
        else:
            yield _drawn(order, split, number, place)


def _facts_of(order: Order) -> list[int]:
    """How many facts each level has, so that as many training documents as the level says tell each one."""
    return [max(1, order.documents // len(order.levels) // level) for level in order.levels]


def _drawn(order: Order, split: str, number: int, place: int) -> np.ndarray:
    for attempt in range(_ATTEMPTS):
        draws = Draws(order.task, order.seed, split, number, attempt)
        ids = _document(order, place, order.levels[place], draws)
        held_out = zlib.crc32(ids.astype("<i8").tobytes()) % _SPLIT_IN == 0
        if held_out == (split == "validation"):
            return ids
    raise ConfigError(
        f"{order.task} has too few different documents of this level to hold some out",
        field="--levels",
        value=order.levels[place],
        fix="leave it out, or use more symbols",
    )


def _document(order: Order, place: int, level: int, draws: Draws) -> np.ndarray:
    inside = TASKS[order.task].between(draws, level, order.symbols)
    return np.array([begin_id(order.task), *inside, FIRST_END + place], dtype=np.int64)
