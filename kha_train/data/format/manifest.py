"""`manifest.json` of a dataset, format version 1: what the shards hold, and how to verify it.

The manifest is written last, by an atomic rename: a directory without one is not a dataset. Everything in it is checked
when it is read, because a shrunken or swapped shard would silently change the order of a whole run. docs/data.md
describes every field.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from kha_train.config.first_steps import quickstart_first
from kha_train.data.format.canonical import canonical_sha256, parse_json
from kha_train.errors import ConfigError, DataError, either
from kha_train.foreign.files import read_regular
from kha_train.foreign.typed import LARGEST, short

T = TypeVar("T")

MANIFEST_NAME = "manifest.json"
FORMAT = "kha_train.shards"
VERSION = 1
MAX_BYTES = 2**30
CRC_BLOCK_BYTES = 65_536
ENDS_PER_BLOCK = CRC_BLOCK_BYTES // 8
DTYPE_BYTES = {"uint16": 2, "uint32": 4}

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_CONTENT = ("content_id", "tool")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file beside the manifest: its bare name, size in bytes and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: its three files and their content. `text_bytes` is the number of UTF-8 bytes that its tokens stand
    for.

    The ids are the last `tok.bytes` bytes of their file, after a foreign header of `tok_offset` bytes.
    """

    tokens: int
    documents: int
    text_bytes: int
    min_id: int
    max_id: int
    tok: FileEntry
    doc: FileEntry
    crc: FileEntry
    tok_offset: int = 0


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the ids. `file` is beside the manifest (None: there is none); `bytes_per_id` has `vocab`
    entries.
    """

    kind: str
    vocab: int
    sha256: str
    file: str | None
    special_ids: dict[str, int]
    bytes_per_id: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A checked manifest. `content_id` identifies the data: SHA-256 of the canonical JSON without itself and `tool`."""

    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[ShardEntry, ...]
    tokenizer: TokenizerEntry
    corpus: dict[str, Any]
    tool: str
    content_id: str


def dtype_for(vocab_size: int) -> str:
    """The narrowest id type of the format for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def content_id_of(raw: dict[str, Any]) -> str:
    """The content id of a manifest, given as the JSON object in the file."""
    return canonical_sha256({k: v for k, v in raw.items() if k not in _NOT_CONTENT})


def build(
    shards: list[ShardEntry], tokenizer: TokenizerEntry, *, dtype: str, corpus: dict[str, Any], tool: str
) -> dict[str, Any]:
    """The JSON object of a manifest for finished shards, including the content id."""
    raw = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "byte_order": "little",
        "crc_block_bytes": CRC_BLOCK_BYTES,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": sum(shard.text_bytes for shard in shards),
        "shards": [asdict(shard) for shard in shards],
        "tokenizer": {**asdict(tokenizer), "bytes_per_id": list(tokenizer.bytes_per_id)},
        "corpus": corpus,
        "tool": tool,
    }
    return {**raw, "content_id": content_id_of(raw)}


def shard_entry(raw: dict[str, Any]) -> ShardEntry:
    """The entry whose `asdict` is `raw`, from one of our notes."""
    files = {key: FileEntry(**raw[key]) for key in ("tok", "doc", "crc")}
    return ShardEntry(**{**raw, **files})


def publish(directory: Path, raw: dict[str, Any]) -> Manifest:
    """Write `raw` as the directory's manifest by atomic rename, after checking it as a reader would.

    Raises DataError when a reader of format version 1 would reject it.
    """
    path = directory / MANIFEST_NAME
    manifest = parse(raw, path)
    temporary = directory / f".{MANIFEST_NAME}.{os.getpid()}"
    with open(temporary, "w", encoding="ascii") as file:
        file.write(_indented(raw))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return manifest


def load(directory: Path, *, field: str) -> Manifest:
    """Read and check the manifest of a dataset directory; `field` is the configuration key that named it.

    Raises ConfigError when there is no dataset, DataError when the manifest is damaged or edited.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        problem = "no such dataset directory"
        raise ConfigError(problem, field=field, value=str(directory), fix=_instead_of(directory), code="E01")
    try:
        text = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", field=str(path)) from error
    if text is None:
        binaries = sum(1 for _ in directory.glob("*.bin"))
        foreign = f", but {binaries} files named *.bin" if binaries else ""
        problem = f"not a finished dataset: it has no {MANIFEST_NAME}{foreign}"
        fix = "`kha data import` makes shards of them" if binaries else _instead_of(directory)
        raise ConfigError(problem, field=field, value=str(directory), fix=fix, code="E01")
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", field=str(path), fix="write the dataset again") from error
    return parse(raw, path)


def _instead_of(directory: Path) -> str:
    """The fix for a `directory` without a manifest: datasets in it, the quickstart, or one of nearly the same name."""
    inside = [one.parent.name for one in sorted(directory.glob(f"*/{MANIFEST_NAME}"))]
    if inside:
        return f"name one of those in it: {', '.join(inside)}"
    if quickstart := quickstart_first(directory):
        return either(quickstart, "name your own shards")
    beside = [one.parent.name for one in directory.parent.glob(f"*/{MANIFEST_NAME}")] if directory.name else []
    close = get_close_matches(directory.name, beside, n=1)
    return f"did you mean {directory.parent / close[0]}?" if close else "`kha data tokenize` makes one"


def parse(raw: object, path: Path | str) -> Manifest:
    """The manifest in the JSON value `raw`; errors name `path`. Raises DataError for every inconsistency."""
    top = _Object(raw, str(path), "")
    raw = top.raw
    if top.text("format") != FORMAT:
        raise top.fault("format", f"is not a {FORMAT} manifest", raw["format"])
    if top.number("version", 1) != VERSION:
        raise top.fault("version", f"this program reads version {VERSION}", raw["version"])
    if top.text("byte_order") != "little" or top.number("crc_block_bytes", 1) != CRC_BLOCK_BYTES:
        raise top.fault("byte_order", "version 1 is little-endian with checksum blocks of 65536 bytes", None)
    dtype = top.text("dtype")
    if dtype not in DTYPE_BYTES:
        raise top.fault("dtype", "unknown id type", dtype)
    tokenizer = _tokenizer(top.child("tokenizer"))
    if dtype == "uint16" and tokenizer.vocab > 65_536:
        raise top.fault("dtype", f"too narrow for a vocabulary of {tokenizer.vocab}", dtype)
    shards = tuple(_shard(entry, dtype, tokenizer.vocab) for entry in top.children("shards"))
    if not shards:
        raise top.fault("shards", "a dataset has at least one shard", None)
    names = [file.file for shard in shards for file in (shard.tok, shard.doc, shard.crc)]
    if len(set(names)) != len(names):
        raise top.fault("shards", "two entries name one file", None)
    for key in ("tokens", "documents", "text_bytes"):
        total = sum(getattr(shard, key) for shard in shards)
        if top.number(key) != total:
            raise top.fault(key, f"the shards add up to {total}", raw[key])
    found = content_id_of(raw)
    if top.text("content_id") != found:
        raise top.fault("content_id", f"the manifest was edited: its content gives {found}", raw["content_id"])
    return Manifest(
        dtype=dtype,
        tokens=raw["tokens"],
        documents=raw["documents"],
        text_bytes=raw["text_bytes"],
        shards=shards,
        tokenizer=tokenizer,
        corpus=top.child("corpus").raw,
        tool=top.text("tool"),
        content_id=found,
    )


class _Object:
    """A JSON object being checked: every access names the place where it fails."""

    def __init__(self, raw: object, path: str, place: str) -> None:
        self.path, self.place = path, place
        if not isinstance(raw, dict):
            raise DataError("an object is expected", field=f"{path} {place}".rstrip())
        self.raw: dict[str, Any] = raw

    def fault(self, key: str, problem: str, value: Any) -> DataError:
        """An error about the value of `key`."""
        return DataError(problem, field=f"{self.path} {self.place}{key}", value=value, fix="write the dataset again")

    def get(self, key: str, kind: type[T]) -> T:
        """The value of `key`, checked to be of type `kind`."""
        value = self.raw.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fault(key, f"expected {kind.__name__}", str(value)[:80])
        return value

    def text(self, key: str) -> str:
        """The text under `key`."""
        return self.get(key, str)

    def number(self, key: str, least: int = 0) -> int:
        """The integer under `key`, at least `least`."""
        value = self.get(key, int)
        if value < least:
            raise self.fault(key, f"must be at least {least}", value)
        if value > LARGEST:
            raise self.fault(key, f"must be at most {LARGEST}", short(value))
        return value

    def digest(self, key: str) -> str:
        """The hexadecimal SHA-256 under `key`."""
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            raise self.fault(key, "expected a SHA-256 in hexadecimal", value[:80])
        return value

    def file_name(self, key: str) -> str:
        """The bare file name under `key`."""
        value = self.text(key)
        if not _FILE_NAME.fullmatch(value):
            raise self.fault(key, "expected a bare file name inside the dataset directory", value[:80])
        return value

    def child(self, key: str) -> _Object:
        """The object under `key`."""
        return _Object(self.get(key, dict), self.path, f"{self.place}{key}.")

    def children(self, key: str) -> list[_Object]:
        """The objects in the list under `key`."""
        return [_Object(v, self.path, f"{self.place}{key}[{i}].") for i, v in enumerate(self.get(key, list))]


def _tokenizer(entry: _Object) -> TokenizerEntry:
    vocab = entry.number("vocab", 1)
    bytes_per_id = tuple(entry.get("bytes_per_id", list))
    if len(bytes_per_id) != vocab or not all(type(n) is int and 0 <= n <= LARGEST for n in bytes_per_id):
        raise entry.fault("bytes_per_id", f"expected {vocab} counts of bytes", None)
    special = entry.child("special_ids")
    special_ids = {name: special.number(name) for name in special.raw}
    if any(number >= vocab for number in special_ids.values()):
        raise entry.fault("special_ids", f"an id is outside the vocabulary of {vocab}", special_ids)
    return TokenizerEntry(
        kind=entry.text("kind"),
        vocab=vocab,
        sha256=entry.digest("sha256"),
        file=None if entry.raw.get("file") is None else entry.file_name("file"),
        special_ids=special_ids,
        bytes_per_id=bytes_per_id,
    )


def _file(entry: _Object) -> FileEntry:
    return FileEntry(entry.file_name("file"), entry.number("bytes", 1), entry.digest("sha256"))


def _shard(entry: _Object, dtype: str, vocab: int) -> ShardEntry:
    shard = ShardEntry(
        tokens=entry.number("tokens", 1),
        documents=entry.number("documents", 1),
        text_bytes=entry.number("text_bytes"),
        min_id=entry.number("min_id"),
        max_id=entry.number("max_id"),
        tok=_file(entry.child("tok")),
        doc=_file(entry.child("doc")),
        crc=_file(entry.child("crc")),
        tok_offset=entry.number("tok_offset"),
    )
    if not shard.min_id <= shard.max_id < vocab:
        raise entry.fault("max_id", f"expected min_id <= max_id < vocabulary {vocab}", shard.max_id)
    blocks, ends_blocks = -(-shard.tok.bytes // CRC_BLOCK_BYTES), -(-shard.documents // ENDS_PER_BLOCK)
    sizes = {
        "tok": (shard.tok.bytes, shard.tokens * DTYPE_BYTES[dtype]),
        "doc": (shard.doc.bytes, shard.documents * 8),
        "crc": (shard.crc.bytes, blocks * 4 + ends_blocks * 12),
    }
    for key, (found, expected) in sizes.items():
        if found != expected:
            raise entry.fault(f"{key}.bytes", f"the counts of the shard give {expected}", found)
    return shard


def _indented(raw: dict[str, Any]) -> str:
    """Readable JSON, with the long table on one line."""
    table = json.dumps(raw["tokenizer"]["bytes_per_id"], separators=(",", ":"))
    text = json.dumps({**raw, "tokenizer": {**raw["tokenizer"], "bytes_per_id": "@"}}, indent=1)
    return text.replace('"bytes_per_id": "@"', f'"bytes_per_id": {table}')
