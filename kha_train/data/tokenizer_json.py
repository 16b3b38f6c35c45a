"""Tokenizers of the `tokenizers` library, in its file `tokenizer.json`: those of most published models. The only user
of that library.

Text is data: where it spells a special token (`<|endoftext|>`), it is encoded like any other text. Every encoded text
is decoded again and compared, because the file comes from elsewhere and the library promises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kha_train.data.tokenizer import BLANK, PROBE, SURROGATES, Tokenizer
from kha_train.data.tokenizer_parts import read_parts
from kha_train.errors import ConfigError, DataError
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, read_regular

MOST_BYTES = 256 << 20
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a tokenizer that name its special tokens."""
USUAL = {
    "pad": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]", "<|finetune_right_pad_id|>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "[BOS]"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "[EOS]"),
    "unk": ("<unk>", "[UNK]"),
}
"""What special tokens are usually called, where no file beside the tokenizer names them."""


class TokenizerJson(Tokenizer):
    """A `tokenizer.json`. `threads` are those of the library (None: one per core).

    Raises ConfigError when the library is missing, and when the file is malformed or would lose text.
    """

    kind = "tokenizers"
    file_name = "tokenizer.json"
    library = "tokenizers"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            fix = "pip install 'kha_train[data]'"
            raise ConfigError("needs the library tokenizers", field="tokenizer", value=str(path), fix=fix) from error
        parts = read_parts(_read(path, MOST_BYTES), str(path))
        super().__init__(path, parts.table, parts.byte_ids, SURROGATES + BLANK * parts.signed)
        self._content = json.dumps(parts.document, ensure_ascii=False)
        with _Refused(path):
            self._library = Library.from_str(self._content)
        self._library.encode_special_tokens = True
        self._one_by_one = threads == 1
        self._added, self._pieces = parts.added, parts.pieces
        self.prefix = parts.prefix
        self._left_out = parts.left_out
        self.special_ids = _special_ids(path, parts.special)
        try:
            self.encode([PROBE])
        except DataError as error:
            raise ConfigError("would lose text", field="tokenizer", value=str(path)) from error

    @classmethod
    def claims(cls, path: Path) -> bool:
        """See `Tokenizer.claims`."""
        return path.suffix == ".json"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.encode`. Raises DataError also where the ids do not give the text back."""
        encoded = super().encode(texts)
        for text, ids in zip(texts, encoded, strict=True):
            whole = (self.prefix if text else "") + text
            if self.decode_bytes(ids.tolist()) != whole.encode("utf-8", "surrogateescape"):
                raise DataError("the tokenizer does not give this text back", field=str(self.path), value=text[:80])
        return encoded

    def library_ids(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.library_ids`."""
        # A batch of one text runs in this thread, whatever the library's environment variables say.
        batches = [[text] for text in texts] if self._one_by_one else [texts]
        encoded = (self._library.encode_batch_fast(batch, add_special_tokens=False) for batch in batches if batch)
        return [one.ids for batch in encoded for one in batch]

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer.id_of`."""
        number: int | None = self._library.token_to_id(token)
        return number

    @property
    def encoder(self) -> str:
        """See `Tokenizer.encoder`; with what was left out of the file's pipeline."""
        return " without ".join((super().encoder, *self._left_out))

    @property
    def fast_model(self) -> dict[str, bytes]:
        """See `Tokenizer.fast_model`."""
        return {"tokenizer_json": self._content.encode()}

    @property
    def spelled(self) -> list[str]:
        """See `Tokenizer.spelled`: every added token."""
        return self._added

    @property
    def pieces(self) -> list[str] | None:
        """See `Tokenizer.pieces`."""
        return self._pieces


class _Refused:
    """Turns what the library raises, which is of no kind of its own, into ConfigError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and kind in (Exception, ValueError):
            problem = f"the library tokenizers rejects it: {' '.join(str(error).split())[:200]}"
            raise ConfigError(problem, field="tokenizer", value=str(self._path)) from error


def _read(path: Path, limit: int) -> Any:
    """The value of a JSON file, None where there is none. Raises ConfigError when it is damaged."""
    raw = read_regular(path, limit, ConfigError)
    try:
        return None if raw is None else parse_json(raw)
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", field="tokenizer", value=str(path)) from error


def _special_ids(path: Path, special: Mapping[str, int]) -> dict[str, int]:
    """The ids of pad, bos, eos and unk: as a file beside the tokenizer names them, else by their usual names."""
    found: dict[str, int] = {}
    for name, usual in USUAL.items():
        named = [_text(settings.get(f"{name}_token")) for settings in map(_settings, _beside(path))]
        token = next((text for text in (*named, *usual) if text in special), None)
        if token is not None:
            found[name] = special[token]
    return found


def _beside(path: Path) -> list[Path]:
    return [path.with_name(name) for name in SETTINGS]


def _settings(path: Path) -> dict[str, Any]:
    value = _read(path, SMALL)
    return value if isinstance(value, dict) else {}


def _text(token: Any) -> str | None:
    """A token as a file names it: as text, or as an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
