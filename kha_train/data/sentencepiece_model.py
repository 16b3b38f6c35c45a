"""Tokenizers of sentencepiece: BPE with byte fallback, trained here or elsewhere. The only user of sentencepiece.

Nothing is normalised: no dummy prefix, blanks kept, digits split. Sentencepiece writes a blank as U+2581, so a U+2581
in the text would come back as a blank. It is therefore encoded as bytes, and so is anything that is not UTF-8.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kha_train.data.tokenizer import BLANK, PROBE, SURROGATES, Tokenizer
from kha_train.errors import ConfigError, KhaError

SPECIAL_IDS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
PIECE_CHARACTERS = 2000


def train(texts: Iterable[str], path: Path, *, vocab_size: int) -> SentencePiece:
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
            required_chars=BLANK,  # otherwise a rare blank would be lost
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
    return SentencePiece(path)


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


class SentencePiece(Tokenizer):
    """A sentencepiece model. `threads` are those of the library (None: one per core).

    Raises ConfigError when the file is not a sentencepiece model, or would lose text.
    """

    kind = "sentencepiece-bpe"
    file_name = "tokenizer.model"
    library = "sentencepiece"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        import sentencepiece

        model = path.read_bytes()
        try:
            # From an empty file the library makes a processor that fails later.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"none")
        except RuntimeError as error:
            raise ConfigError("not a sentencepiece model", field="tokenizer", value=str(path)) from error
        self._model, self._threads = model, threads
        table = [self._bytes_of(number) for number in range(self._processor.vocab_size())]
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        super().__init__(path, table, byte_ids, BLANK + SURROGATES)
        numbers = {name: getattr(self._processor, f"{name}_id")() for name in SPECIAL_IDS}
        self.special_ids = {name: number for name, number in numbers.items() if number >= 0}
        trainer = specification(model).trainer_spec
        self._is_bpe = trainer.model_type == trainer.BPE
        keeps_bytes = all(map(self._processor.is_byte, byte_ids))
        if not keeps_bytes or _rewrites(model) or self.decode(self.encode([PROBE])[0]) != PROBE:
            raise ConfigError(
                "this model would lose text",
                field="tokenizer",
                value=str(path),
                allowed="byte fallback, identity normalisation, no dummy prefix, blanks kept",
                fix="`kha data tokenizer` trains one",
            )

    @classmethod
    def claims(cls, path: Path) -> bool:
        """See `Tokenizer.claims`: any name that is not another kind's."""
        return True

    def library_ids(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.library_ids`."""
        encoded: list[list[int]] = self._processor.encode(texts, num_threads=self._threads)
        return encoded

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer.id_of`."""
        number = int(self._processor.piece_to_id(token))
        return number if self._processor.id_to_piece(number) == token else None

    @property
    def fast_model(self) -> dict[str, bytes]:
        """See `Tokenizer.fast_model`."""
        return {"sentencepiece": self._model}

    @property
    def spelled(self) -> Iterable[str]:
        """See `Tokenizer.spelled`: control pieces and the unknown one."""
        return [self._processor.id_to_piece(number) for number, data in enumerate(self._table) if not data]

    @property
    def pieces(self) -> list[str] | None:
        """See `Tokenizer.pieces`. A unigram model scores a whole text at once."""
        if not self._is_bpe:
            return None
        return [self._processor.id_to_piece(number).replace(BLANK, " ") for number in range(self.vocab_size)]

    def _bytes_of(self, number: int) -> bytes:
        if self._processor.is_control(number) or self._processor.is_unknown(number):
            return b""
        piece = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(BLANK, " ").encode()


def _rewrites(model: bytes) -> bool:
    """Whether a model has rules that change characters before encoding."""
    return bool(specification(model).normalizer_spec.precompiled_charsmap)


def specification(model: bytes) -> Any:
    """The parsed content of a sentencepiece model file."""
    from sentencepiece import sentencepiece_model_pb2

    # protobuf creates the class at import, so type checkers do not see it.
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
