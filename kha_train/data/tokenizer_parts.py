"""Reads a `tokenizer.json` without the library: which bytes every id stands for, and which parts would lose text.

The file describes a pipeline: a normaliser rewrites the text, a pre-tokeniser cuts it, a model encodes the parts. Only
pipelines that keep every byte are accepted, of two families. *Byte-level* ones (GPT-2, Llama 3, Qwen) write each byte
as one printable character. Those with *byte fallback* (Llama 2, Mistral, converted sentencepiece) have pieces of text,
with U+2581 or a plain blank for a blank, and a piece `<0xNN>` for every byte.

Two parts that would lose text are left out. Unicode's composition (NFC) is: text keeps its own form, and other ids than
with it arise only for text that is not in that form. A blank that is put before a text unless it has one is put
before every text, so that it can be taken off again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from kha_train.data.tokenizer import BLANK
from kha_train.errors import ConfigError
from kha_train.foreign.documents import Json
from kha_train.foreign.typed import Absent, Range, Source

MOST_IDS = 1 << 24
"""More ids than this are a damaged file."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
_KEEP_TEXT = ("Digits", "Punctuation", "Split", "UnicodeScripts")
_BLANK_TO_SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_SIGN_WITH_NEXT = {
    "type": "Split",
    "pattern": {"String": BLANK},
    "behavior": "MergedWithNext",
    "invert": False,
}
Id = Annotated[int, Range(0, MOST_IDS - 1)]
BytesOf = Callable[[str], bytes | None]


class AddedToken(TypedDict):
    """A token that is cut out of the text before the model sees it; a special one stands for no text."""

    id: Id
    content: str
    special: bool
    lstrip: Annotated[bool, Absent(False)]
    rstrip: Annotated[bool, Absent(False)]


class Model(TypedDict):
    """The model: `vocab` is a mapping from token to id (BPE) or a list of tokens with scores (Unigram)."""

    type: str
    vocab: Json
    unk_token: Annotated[str | None, Absent(None)]
    unk_id: Annotated[int | None, Absent(None)]
    byte_fallback: Annotated[bool, Absent(False)]
    dropout: Annotated[float | None, Absent(None)]
    continuing_subword_prefix: Annotated[str | None, Absent(None)]
    end_of_word_suffix: Annotated[str | None, Absent(None)]


class Document(TypedDict):
    """The fields of a `tokenizer.json` that decide which text an id stands for."""

    added_tokens: Annotated[list[AddedToken], Absent([])]
    normalizer: Annotated[dict[str, Any] | None, Absent(None)]
    pre_tokenizer: Annotated[dict[str, Any] | None, Absent(None)]
    model: Model


@dataclass(frozen=True)
class Parts:
    """What a file says. `table` has the bytes of every id, `byte_ids` the id of every byte, `special` the special
    tokens with their ids, `added` the texts of all added tokens. `document` is the file without the parts that would
    lose text, which `left_out` names, and `prefix` is what to put before every text instead. `signed` says that a
    blank is written U+2581, `pieces` are those of a BPE model that sees the whole text (None for others).
    """

    document: dict[str, Any]
    table: list[bytes]
    byte_ids: list[int]
    special: dict[str, int]
    added: list[str]
    prefix: str
    signed: bool
    left_out: tuple[str, ...]
    pieces: list[str] | None


def read_parts(value: Json, name: str) -> Parts:
    """The parts of a parsed `tokenizer.json`; `name` is how errors call it. Raises ConfigError for a file that is
    malformed or of a family that is not known to keep every byte.
    """
    source = Source(name, ConfigError, "use the tokenizer.json that belongs to the model")
    document = source.read(Document, value)
    model = document["model"]
    tokens = _tokens(model, source)
    refuse = _Refusal(name)
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise refuse("its model drops merges or marks parts of words")
    normalizer, prefix, signed, left_out = _normalizer(document, refuse)
    cuts, before, sign = _pre_tokenizer(document, refuse)
    prefix, signed = prefix or before, signed or sign
    normalizer += [_BLANK_TO_SIGN] * (sign and _BLANK_TO_SIGN not in normalizer)
    left_out += ("a blank before texts without one",) * bool(before)
    byte_level = any(step["type"] == "ByteLevel" for step in cuts)
    added = {token["content"]: token for token in document["added_tokens"]}
    if any(token["lstrip"] or token["rstrip"] for token in added.values() if not token["special"]):
        raise refuse("it has added tokens that swallow the blanks beside them")
    table = _table(tokens, added, _of_byte_level(byte_alphabet()) if byte_level else _of_pieces(signed), refuse)
    unknown = tokens.get(model["unk_token"] or "") if model["unk_id"] is None else model["unk_id"]
    if unknown is not None and 0 <= unknown < len(table):
        table[unknown] = b""
    if not byte_level and not model["byte_fallback"]:
        raise refuse("it has no byte fallback")
    byte_ids = _byte_ids(tokens, byte_level, refuse)
    whole = model["type"] == "BPE" and not cuts and all(token["special"] for token in added.values())
    return Parts(
        document={
            **value,
            "normalizer": _sequence("normalizer", normalizer),
            "pre_tokenizer": _sequence("pre_tokenizer", cuts),
            "truncation": None,
            "padding": None,
        },
        table=table,
        byte_ids=byte_ids,
        special={text: token["id"] for text, token in added.items() if token["special"]},
        added=list(added),
        prefix=prefix,
        signed=signed,
        left_out=left_out,
        pieces=[token.replace(BLANK, " ") if signed else token for token in tokens] if whole else None,
    )


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte, as GPT-2 defined it: bytes that are
    printable in Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class _Refusal:
    """Makes the error about the tokenizer called `name`."""

    name: str

    def __call__(self, reason: str) -> ConfigError:
        return ConfigError(
            f"would lose text: {reason}",
            field="tokenizer",
            value=self.name,
            allowed="byte-level BPE (as of GPT-2, Llama 3, Qwen), or byte fallback (as of Llama 2, sentencepiece)",
        )


def _tokens(model: Model, source: Source) -> dict[str, int]:
    """The model's own tokens with their ids."""
    kind, vocab = model["type"], model["vocab"]
    if kind == "BPE":
        return source.read(dict[str, Id], vocab, "model.vocab")
    if kind == "Unigram":
        pairs = source.read(list[tuple[str, float]], vocab, "model.vocab")
        return {token: number for number, (token, _) in enumerate(pairs)}
    raise source.fault("model.type", "is not a known model", kind, "BPE, Unigram")


def _steps(document: Document, place: str) -> list[dict[str, Any]]:
    """The steps of a part of the pipeline, sequences inside sequences laid out."""

    def flat(step: Any) -> Iterator[dict[str, Any]]:
        """The steps inside `step`, or itself."""
        inside = step.get(_LISTS[place]) if isinstance(step, dict) else None
        if isinstance(inside, list):
            for one in inside:
                yield from flat(one)
        elif isinstance(step, dict):
            yield step

    fields: Mapping[str, Any] = document
    return list(flat(fields[place]))


def _sequence(place: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", _LISTS[place]: steps}


def _normalizer(document: Document, refuse: _Refusal) -> tuple[list[dict[str, Any]], str, bool, tuple[str, ...]]:
    """The steps to keep, what they put before a text, whether they write blanks as U+2581, and what was left out."""
    kept: list[dict[str, Any]] = []
    prefix = ""
    left_out: tuple[str, ...] = ()
    for step in _steps(document, "normalizer"):
        kind = step.get("type")
        if kind == "NFC":
            left_out = ("NFC",)
        elif kind == "Prepend" and step.get("prepend") in (" ", BLANK):
            prefix = " "
        elif step == _BLANK_TO_SIGN:
            kept.append(step)
        else:
            raise refuse(f"its normaliser {kind} rewrites text")
    return kept, prefix, bool(kept), left_out


def _pre_tokenizer(document: Document, refuse: _Refusal) -> tuple[list[dict[str, Any]], str, bool]:
    """The steps to keep, what they put before a text, and whether they write blanks as U+2581."""
    kept: list[dict[str, Any]] = []
    prefix, signed = "", False
    for step in _steps(document, "pre_tokenizer"):
        kind = step.get("type")
        if kind == "ByteLevel":
            prefix = " " if step.get("add_prefix_space", True) else prefix
            kept.append({**step, "add_prefix_space": False})
        elif kind == "Metaspace" and step.get("replacement") == BLANK:
            never = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
            prefix, signed = prefix if never else " ", True
            kept += [_SIGN_WITH_NEXT] if step.get("split", True) else []
        elif kind in _KEEP_TEXT and step.get("behavior") != "Removed":
            kept.append(step)
        else:
            raise refuse(f"its pre-tokeniser {kind} is not known to keep all text")
    return kept, prefix, signed


def _table(tokens: dict[str, int], added: dict[str, AddedToken], of: BytesOf, refuse: _Refusal) -> list[bytes]:
    """The bytes of every id; none where no token has it, and for special tokens."""
    ids = [*tokens.values(), *(token["id"] for token in added.values())]
    if not ids:
        raise refuse("it has no tokens")
    table = [b""] * (max(ids) + 1)
    for token, number in tokens.items():
        if token not in added:
            found = of(token)
            if found is None:
                raise refuse(f"its token {token!r} is not written in bytes")
            table[number] = found
    for text, entry in added.items():
        table[entry["id"]] = b"" if entry["special"] else text.encode()
    return table


def _of_byte_level(alphabet: Mapping[str, int]) -> BytesOf:
    def of(token: str) -> bytes | None:
        """The bytes of a token of printable characters; None where one stands for no byte."""
        return bytes([alphabet[letter] for letter in token]) if alphabet.keys() >= set(token) else None

    return of


def _of_pieces(signed: bool) -> BytesOf:
    def of(token: str) -> bytes:
        """The bytes of a piece."""
        byte = _BYTE_PIECE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else (token.replace(BLANK, " ") if signed else token).encode()

    return of


def _byte_ids(tokens: dict[str, int], byte_level: bool, refuse: _Refusal) -> list[int]:
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    names = [letters[byte] if byte_level else f"<0x{byte:02X}>" for byte in range(256)]
    missing = [byte for byte, name in enumerate(names) if name not in tokens]
    if missing:
        raise refuse(f"it has no token for the byte {missing[0]:#04x}")
    return [tokens[name] for name in names]
