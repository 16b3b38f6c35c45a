"""Documents to be copied: random symbols, a mark, the same symbols again, the end.

With n symbols out of V, a document costs at best n ln V nats of its 2 n + 2 tokens, and a model that has not learned to
copy pays 2 n ln V. So the train loss begins near ln V and falls to about half of that; a threshold between the two says
when copying was learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.synthetic import END_ID, write_split
from kha_train.data.format.manifest import Manifest
from kha_train.data.sampling.order import keyed_hash

ANSWER_ID = 1
"""The mark before an answer."""
FIRST_SYMBOL = 2


def write_copy(
    directory: str | Path,
    *,
    symbols: int = 62,
    documents: int = 65_536,
    validation_documents: int = 512,
    lengths: tuple[int, int] = (7, 15),
    seed: int = 0,
) -> tuple[Manifest, Manifest]:
    """Write `directory/train` and `directory/validation`; returns their manifests.

    The vocabulary has `symbols` + 2 ids. A document repeats between `lengths` symbols, both included.
    """

    def split(name: str, count: int, key: int) -> Manifest:
        corpus = {"source": "copy", "documents": count, "key": key, "symbols": symbols, "lengths": list(lengths)}
        special = {"eos": END_ID, "answer": ANSWER_ID}

        def made(numbers: range) -> Iterator[np.ndarray]:
            return copies(numbers, symbols, key, lengths)

        return write_split(Path(directory) / name, made, corpus, symbols + FIRST_SYMBOL, 8192, special)

    return split("train", documents, 2 * seed), split("validation", validation_documents, 2 * seed + 1)


def copies(numbers: range, symbols: int, key: int, lengths: tuple[int, int]) -> Iterator[np.ndarray]:
    """The copy documents with the given numbers, int64 ids; each a pure function of (number, symbols, key, lengths)."""
    shortest, longest = lengths
    places = np.arange(longest + 1, dtype=np.uint64)
    for number in numbers:
        drawn = keyed_hash(places, np.uint64(key * 1_000_003 + number))
        length = shortest + int(drawn[-1] % np.uint64(longest - shortest + 1))
        ids = FIRST_SYMBOL + (drawn[:length] % np.uint64(symbols)).astype(np.int64)
        yield np.concatenate([ids, [ANSWER_ID], ids, [END_ID]])
