"""What every tokenizer here promises: text becomes ids and comes back unchanged, byte for byte.

There are two kinds, `sentencepiece_model.py` and `tokenizer_json.py`; `tokenizer_kinds.py` opens a file of either. Each
gives the table of bytes per id, which decoding and bits per byte need. Encoding is the library's, except where that
would lose text: characters that the library rewrites, and bytes that are not UTF-8, are encoded as single bytes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from kha_train.data.fast_encoder import FastEncoder
from kha_train.data.format.canonical import sha256_of_file
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.errors import ConfigError, DataError, Options

LONG_CHARACTERS = 1 << 18
"""Longer texts are encoded in parts: a library needs about fifty bytes per character at a time."""
BLANK = "\u2581"
"""How sentencepiece, and those who follow it, write a blank in a piece."""
SURROGATES = "\ud800-\udfff"
PROBE = "a  \ufb01 \t\n\u00e9 \U0001f600 7\r\n "
"""Text that shows most ways of losing some."""
_COMPARED_BATCHES = 32


class Tokenizer(ABC):
    """A loaded tokenizer file. `path`, `sha256`, `vocab_size`, and `special_ids` by name (only those the file has).

    `prefix` is what `encode` puts before each text, and so the beginning of what `decode` returns; most have none.
    """

    kind: ClassVar[str]
    """Its name in manifests."""
    file_name: ClassVar[str]
    """The name of its file in a dataset."""
    library: ClassVar[str]
    """The library that encodes."""

    path: Path
    sha256: str
    vocab_size: int
    special_ids: dict[str, int]
    prefix: str = ""

    def __init__(self, path: Path, table: Sequence[bytes], byte_ids: Sequence[int], as_bytes: str) -> None:
        """`table` has the bytes of every id, `byte_ids` the id of every single byte. Characters of the class `as_bytes`
        of a regular expression are encoded as bytes."""
        self.path, self.sha256, self.vocab_size = path, sha256_of_file(path), len(table)
        self._table, self._byte_ids = table, byte_ids
        self._as_bytes = re.compile(f"([{as_bytes}]+)")
        self._fast: FastEncoder | None = None
        self._batches = 0

    @classmethod
    @abstractmethod
    def claims(cls, path: Path) -> bool:
        """Whether the file at `path` is named like one of this kind."""

    @abstractmethod
    def library_ids(self, texts: list[str]) -> list[list[int]]:
        """The library's ids of texts without characters that are encoded as bytes."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token that is spelled like this, such as `</s>`; None where there is none."""

    @property
    @abstractmethod
    def fast_model(self) -> Mapping[str, bytes]:
        """What `FastEncoder` is made from."""

    @property
    def spelled(self) -> Iterable[str]:
        """Pieces that gigatoken would find in the text, though the library finds none; such texts are kept from it."""
        return ()

    @property
    def pieces(self) -> Sequence[str] | None:
        """Every piece of a model that merges neighbours and sees the whole text; None for any other model."""
        return None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without special ids. Raises DataError for text that UTF-8 cannot encode, and when
        gigatoken's ids differ.
        """
        begun = [self.prefix + text if text else text for text in texts] if self.prefix else texts
        whole = [i for i, text in enumerate(begun) if len(text) <= LONG_CHARACTERS and not self._as_bytes.search(text)]
        encoded = dict(zip(whole, self._encode_plain([begun[i] for i in whole]), strict=True))
        ids = (encoded[i] if i in encoded else self._encode_in_parts(text) for i, text in enumerate(begun))
        return [np.asarray(one, dtype=np.int32) for one in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special ids give nothing; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`."""
        return b"".join([self._table[number] for number in ids])

    def bytes_per_id(self) -> tuple[int, ...]:
        """For each id the number of UTF-8 bytes it stands for; 0 for special ids."""
        return tuple(map(len, self._table))

    def entry(self) -> TokenizerEntry:
        """This tokenizer's entry in a dataset's manifest."""
        return TokenizerEntry(
            kind=self.kind,
            vocab=self.vocab_size,
            sha256=self.sha256,
            file=self.file_name,
            special_ids=self.special_ids,
            bytes_per_id=self.bytes_per_id(),
        )

    def padded(self, vocab_size: int) -> Self:
        """This tokenizer for a model with `vocab_size` ids, of which the last stand for nothing. Raises ConfigError
        when the tokenizer has more.
        """
        if vocab_size < self.vocab_size:
            problem, least = "the tokenizer has more ids", f"{self.vocab_size} or more"
            raise ConfigError(problem, field="vocab_size", value=vocab_size, allowed=least)
        made = copy(self)
        made._table = [*self._table, *[b""] * (vocab_size - self.vocab_size)]
        made.vocab_size = vocab_size
        return made

    def with_special_ids(self, special_ids: Mapping[str, int]) -> Self:
        """This tokenizer, with these ids for these special names."""
        made = copy(self)
        made.special_ids = {**self.special_ids, **special_ids}
        return made

    def faster(self) -> Self:
        """This tokenizer with gigatoken as its encoder, of which every 32nd batch is compared with `library_ids`.
        Raises as `FastEncoder`.
        """
        made = copy(self)
        made._fast = FastEncoder(**self.fast_model)
        return made

    @property
    def is_fast(self) -> bool:
        """Whether gigatoken encodes."""
        return self._fast is not None

    @property
    def encoder(self) -> str:
        """The name of the encoder in use."""
        return self.library if self._fast is None else f"gigatoken {self._fast.version}"

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.spelled)) or r"(?!)")

    def _encode_plain(self, texts: list[str]) -> Sequence[np.ndarray | list[int]]:
        """Ids of texts without characters that are encoded as bytes."""
        if self._fast is None:
            return self.library_ids(texts)
        special = [index for index, text in enumerate(texts) if self._spelled.search(text)]
        kept = set(special)
        found: dict[int, np.ndarray | list[int]] = dict(
            zip(special, self.library_ids([texts[index] for index in special]), strict=True)
        )
        others = [index for index in range(len(texts)) if index not in kept]
        ids = self._fast.encode([texts[index] for index in others])
        if self._batches % _COMPARED_BATCHES == 0:
            expected = self.library_ids([texts[index] for index in others])
            for index, fast, plain in zip(others, ids, expected, strict=True):
                if fast.tolist() != plain:
                    raise DataError(
                        f"{self.encoder} gave other ids than {self.library}",
                        field="encoder",
                        value=texts[index][:80],
                        fix=Options("--encoder library --overwrite"),
                    )
        self._batches += 1
        found |= zip(others, ids, strict=True)
        return [found[index] for index in range(len(texts))]

    def _encode_in_parts(self, text: str) -> np.ndarray:
        """Ids of a long text, or one with characters that are encoded as bytes."""
        is_plain = not self._as_bytes.search(text)
        encode = self._encode_plain if is_plain else self.library_ids
        ids = [np.empty(0, dtype=np.int32)]
        for part in self._as_bytes.split(text):
            if not self._as_bytes.match(part):
                ids += [np.asarray(encode([one])[0], dtype=np.int32) for one in self._short_parts(part)]
                continue
            try:
                numbers = [self._byte_ids[byte] for byte in part.encode("utf-8", "surrogateescape")]
            except UnicodeEncodeError as error:
                raise DataError(f"text that UTF-8 cannot encode: {error.reason}", value=part[:20]) from error
            ids.append(np.asarray(numbers, dtype=np.int32))
        return np.concatenate(ids)

    def _short_parts(self, text: str) -> Iterator[str]:
        """`text` cut where this changes no id: between two characters that are adjacent in no piece, so that no merge
        can join them. A stretch without such a position stays whole.
        """
        start = 0
        while len(text) - start > LONG_CHARACTERS and self.pieces is not None:
            places = range(start + LONG_CHARACTERS, len(text))
            end = next((at for at in places if text[at - 1 : at + 1] not in self._neighbours), len(text))
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Every pair of characters that are adjacent in a piece, as they are in the text."""
        return frozenset(pair for piece in self.pieces or () for pair in map("".join, pairwise(piece)))
