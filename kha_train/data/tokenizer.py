"""Lossless conversion between text and ids: sentencepiece BPE with byte fallback. The only user of sentencepiece.

Nothing is normalised: no dummy prefix, blanks kept, digits split. Sentencepiece writes a blank as U+2581, so a U+2581
in the text would come back as a blank. It is therefore encoded as bytes, and so is anything that is not UTF-8.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.config.first_steps import quickstart_first
from kha_train.data.fast_encoder import FastEncoder
from kha_train.data.format.canonical import sha256_of_file
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.errors import ConfigError, DataError, KhaError, Options

KIND = "sentencepiece-bpe"
MODEL_NAME = "tokenizer.model"
SPECIAL_IDS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
PIECE_CHARACTERS = 2000
LONG_CHARACTERS = 1 << 18
"""Longer texts are encoded in parts: the library needs about fifty bytes per character at a time."""
_COMPARED_BATCHES = 32

_BLANK = "\u2581"
_AS_BYTES = re.compile("([\u2581\ud800-\udfff]+)")
_PROBE = "a  \ufb01 \t\n\u00e9 \U0001f600 7\r\n "


def train(texts: Iterable[str], path: Path, *, vocab_size: int) -> Tokenizer:
    """Train on `texts`, cut into pieces of 2000 characters, and write the model file; the same texts give the same
    file.

    Raises ConfigError when the texts cannot give exactly `vocab_size` pieces.
    """
    import sentencepiece

    model, watched = io.BytesIO(), _Watched(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(watched),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars=_BLANK,  # otherwise a rare blank would be lost
            max_sentence_length=8 * PIECE_CHARACTERS,
            num_threads=1,  # recorded in the model file: another count gives another hash
            minloglevel=2,
            pad_id=SPECIAL_IDS["pad"],
            bos_id=SPECIAL_IDS["bos"],
            eos_id=SPECIAL_IDS["eos"],
            unk_id=SPECIAL_IDS["unk"],
        )
    except RuntimeError as error:
        if watched.error is not None:
            raise watched.error from None
        reason = str(error).rpartition("] ")[2].strip() or "there is no text"
        reason = reason.replace(" or decrease character_coverage with --character_coverage option", "")
        raise ConfigError(f"cannot be trained: {reason}", field="vocab_size", value=vocab_size) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(model.getvalue())
    os.replace(beside, path)
    return Tokenizer(path)


class _Watched:
    """Texts in pieces of 2000 characters; keeps the `error` that ended reading, because the library drops it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.error: KhaError | None = None
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for start in range(0, len(text), PIECE_CHARACTERS):
                    yield text[start : start + PIECE_CHARACTERS]
        except KhaError as error:
            self.error = error
            raise


class Tokenizer:
    """A loaded model file. `path`, `sha256`, `vocab_size`, and `special_ids` by name (only those the model has).

    With `fast`, gigatoken encodes where it gives the same ids, and every 32nd batch is compared. `threads` are those of
    sentencepiece (None: one per core). Raises ConfigError when the file is missing, is not a sentencepiece model, or
    would lose text, and as `FastEncoder`.
    """

    def __init__(self, path: str | Path, *, fast: bool = False, threads: int | None = None) -> None:
        import sentencepiece

        self.path = Path(path)
        if not self.path.is_file():
            fix = quickstart_first(self.path) or "`kha data tokenizer` trains one"
            raise ConfigError("no such file", field="tokenizer", value=str(path), fix=fix)
        model = self.path.read_bytes()
        try:
            # From an empty file the library makes a processor that fails later.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"none")
        except RuntimeError as error:
            raise ConfigError("not a sentencepiece model", field="tokenizer", value=str(path)) from error
        self._threads = threads
        self.sha256 = sha256_of_file(self.path)
        self.vocab_size = self._processor.vocab_size()
        numbers = {name: getattr(self._processor, f"{name}_id")() for name in SPECIAL_IDS}
        self.special_ids = {name: number for name, number in numbers.items() if number >= 0}
        self._bytes = [self._bytes_of(number) for number in range(self.vocab_size)]
        self._fast: FastEncoder | None = None
        self._batches = 0
        self._id_of_byte = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._is_bpe = _is_bpe(model)
        keeps_bytes = all(map(self._processor.is_byte, self._id_of_byte))
        if not keeps_bytes or _rewrites(model) or self.decode(self.encode([_PROBE])[0]) != _PROBE:
            raise ConfigError(
                "this model would lose text",
                field="tokenizer",
                value=str(path),
                allowed="byte fallback, identity normalisation, no dummy prefix, blanks kept",
                fix="`kha data tokenizer` trains one",
            )
        spelled = [self._processor.id_to_piece(number) for number, data in enumerate(self._bytes) if not data]
        self._special = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self._fast = FastEncoder(model) if fast else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without special ids. Raises DataError for text that UTF-8 cannot encode, and when
        gigatoken's ids differ.
        """
        whole = [i for i, text in enumerate(texts) if len(text) <= LONG_CHARACTERS and not _AS_BYTES.search(text)]
        encoded = dict(zip(whole, self._encode_plain([texts[i] for i in whole]), strict=True))
        ids = (encoded[i] if i in encoded else self._encode_in_parts(text) for i, text in enumerate(texts))
        return [np.asarray(one, dtype=np.int32) for one in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special ids give nothing; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`."""
        return b"".join([self._bytes[number] for number in ids])

    def bytes_per_id(self) -> tuple[int, ...]:
        """For each id the number of UTF-8 bytes it stands for; 0 for special ids."""
        return tuple(map(len, self._bytes))

    def entry(self) -> TokenizerEntry:
        """This tokenizer's entry in a dataset's manifest."""
        return TokenizerEntry(
            kind=KIND,
            vocab=self.vocab_size,
            sha256=self.sha256,
            file=MODEL_NAME,
            special_ids=self.special_ids,
            bytes_per_id=self.bytes_per_id(),
        )

    @property
    def encoder(self) -> str:
        """The name of the encoder in use."""
        return "sentencepiece" if self._fast is None else f"gigatoken {self._fast.version}"

    def _encode_plain(self, texts: list[str]) -> list[Any]:
        """Ids of texts without U+2581 and surrogates."""
        if self._fast is None:
            encoded: list[Any] = self._processor.encode(texts, num_threads=self._threads)
            return encoded
        special = [index for index, text in enumerate(texts) if self._special.search(text)]
        kept = set(special)
        found: dict[int, Any] = dict(
            zip(special, self._processor.encode([texts[index] for index in special]), strict=True)
        )
        others = [index for index in range(len(texts)) if index not in kept]
        ids = self._fast.encode([texts[index] for index in others])
        if self._batches % _COMPARED_BATCHES == 0:
            expected = self._processor.encode([texts[index] for index in others])
            for index, fast, plain in zip(others, ids, expected, strict=True):
                if fast.tolist() != plain:
                    raise DataError(
                        f"{self.encoder} gave other ids than sentencepiece",
                        field="encoder",
                        value=texts[index][:80],
                        fix=Options("--encoder sentencepiece --overwrite"),
                    )
        self._batches += 1
        found |= zip(others, ids, strict=True)
        return [found[index] for index in range(len(texts))]

    def _encode_in_parts(self, text: str) -> np.ndarray:
        """Ids of a long text, or one with U+2581 or surrogates."""
        is_plain = not _AS_BYTES.search(text)
        encode = (lambda one: self._encode_plain([one])[0]) if is_plain else self._processor.encode
        ids = [np.empty(0, dtype=np.int32)]
        for part in _AS_BYTES.split(text):
            if not _AS_BYTES.match(part):
                ids += [np.asarray(encode(one), dtype=np.int32) for one in self._short_parts(part)]
                continue
            try:
                numbers = [self._id_of_byte[byte] for byte in part.encode("utf-8", "surrogateescape")]
            except UnicodeEncodeError as error:
                raise DataError(f"text that UTF-8 cannot encode: {error.reason}", value=part[:20]) from error
            ids.append(np.asarray(numbers, dtype=np.int32))
        return np.concatenate(ids)

    def _short_parts(self, text: str) -> Iterator[str]:
        """`text` cut where this changes no id: between two characters that are adjacent in no piece, so that no merge
        can join them. A stretch without such a position stays whole.
        """
        start = 0
        while len(text) - start > LONG_CHARACTERS and self._is_bpe:
            places = range(start + LONG_CHARACTERS, len(text))
            end = next((at for at in places if text[at - 1 : at + 1] not in self._neighbours), len(text))
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Every pair of characters that are adjacent in a piece, as they are in the text."""
        pieces = (self._processor.id_to_piece(number).replace(_BLANK, " ") for number in range(self.vocab_size))
        return frozenset(pair for piece in pieces for pair in map("".join, pairwise(piece)))

    def _bytes_of(self, number: int) -> bytes:
        if self._processor.is_control(number) or self._processor.is_unknown(number):
            return b""
        piece = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_BLANK, " ").encode()


def _rewrites(model: bytes) -> bool:
    """Whether a model has rules that change characters before encoding."""
    return bool(_specification(model).normalizer_spec.precompiled_charsmap)


def _is_bpe(model: bytes) -> bool:
    """Whether a model is BPE, which merges pieces; a unigram model scores a whole text at once."""
    trainer = _specification(model).trainer_spec
    return bool(trainer.model_type == trainer.BPE)


def _specification(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    # protobuf creates the class at import, so type checkers do not see it.
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
