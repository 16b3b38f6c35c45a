"""The user's own text as it lies: which files there are, how they are cut into pieces of work, the texts of a piece.

Text files (.txt, .md, .rst, .py) are one document each, JSONL files one a line, in the field `text`; all of these also
packed as .gz or .zst. Parquet files are one a row, in the column `text`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple

from kha_train.errors import ConfigError, DataError

PACKED = (".gz", ".zst")
SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".md", ".py", ".rst", ".txt") for packed in ("", *PACKED)) + (
    ".parquet",
)
UNPACKED_TIMES = 4
"""Packed text is taken to be so many times as long as its file."""


class Document(NamedTuple):
    """One text, named by a POSIX path that is the same on every machine."""

    path: str
    text: str


class TextFile(NamedTuple):
    """A file, and its name: its POSIX path from the name of its root on."""

    name: str
    path: Path

    @property
    def kind(self) -> str:
        """`.jsonl`, `.parquet`, or what else stands before .gz and .zst."""
        return (self.path.with_suffix("") if self.path.suffix in PACKED else self.path).suffix


class Piece(NamedTuple):
    """A part of a file: the lines in bytes [first, last) of JSONL, row groups [first, last) of Parquet, or all of a
    file that can only be read from its beginning. `bytes` are on disk, `text_bytes` about those of the text."""

    file: TextFile
    first: int
    last: int
    bytes: int
    text_bytes: int


def find_files(roots: Sequence[str | Path], field: str) -> list[TextFile]:
    """The files of `roots`, files or directories, each directory's by name; in a directory those of `SUFFIXES`.
    `field` is the option that named them.

    Raises ConfigError for a root that is missing, and for two of one name.
    """
    found: list[TextFile] = []
    names: set[str] = set()
    for given in roots:
        root = Path(given).resolve()
        if root.name in names:
            raise ConfigError("two roots of one name", field=field, value=root.name, fix="rename one")
        names.add(root.name)
        if root.is_dir():
            inside = (Path(folder, name) for folder, _, files in os.walk(root) for name in files)
            named = ((f"{root.name}/{path.relative_to(root).as_posix()}", path) for path in inside)
            found += [TextFile(*one) for one in sorted(named) if one[1].name.endswith(SUFFIXES)]
        elif root.exists():
            found.append(TextFile(root.name, root))
        else:
            raise ConfigError("no such file or directory", field=field, value=str(given))
    return found


def cut(file: TextFile, text_bytes: int) -> Iterator[Piece]:
    """The pieces of a file, of about `text_bytes` each where it can be read from anywhere. Raises as `texts`."""
    size = file.path.stat().st_size
    if file.path.suffix in PACKED:
        yield Piece(file, 0, 0, size, UNPACKED_TIMES * size)
    elif file.kind == ".parquet":
        yield from _cut_row_groups(file, size, text_bytes)
    elif file.kind == ".jsonl":
        with _reading(file.path), open(file.path, "rb") as lines:
            first = 0
            while first < size:
                lines.seek(min(first + text_bytes, size) - 1)
                lines.readline()
                yield Piece(file, first, lines.tell(), lines.tell() - first, lines.tell() - first)
                first = lines.tell()
    else:
        yield Piece(file, 0, 0, size, size)


def texts(piece: Piece, left_out: list[str], advance: Callable[[int], None]) -> Iterator[str]:
    """The texts of a piece that are not empty, in their order. `left_out` gets the name of a file that is not UTF-8;
    `advance` is told bytes of the file, `piece.bytes` in all.

    Raises ConfigError when the file needs pyarrow and that is missing, DataError when it is damaged, cannot be read, or
    holds a line or a row that has no text.
    """
    told = 0
    for text, at in _texts(piece, left_out):
        # What is packed is read ahead of what came out of it.
        if at > told:
            advance(at - told)
            told = at
        if text:
            yield text
    advance(piece.bytes - told)


def _texts(piece: Piece, left_out: list[str]) -> Iterator[tuple[str, int]]:
    """Every text, and how many bytes of the piece it took to get there."""
    file = piece.file
    if file.kind == ".parquet":
        groups = piece.last - piece.first
        for number, group in enumerate(read_parquet(file.path, range(piece.first, piece.last)), start=1):
            yield from ((text, piece.bytes * (number - 1) // groups) for text in group)
    elif file.kind == ".jsonl":
        with open_packed(file.path) as (lines, raw):
            packed, position = file.path.suffix in PACKED, piece.first
            if not packed:
                lines.seek(piece.first)
            for number, line in enumerate(lines, start=1):
                position += len(line)
                if line.strip():
                    text = _text_of(line, number, piece)
                    yield text, raw.tell() if packed else position - piece.first
                if not packed and position >= piece.last:
                    return
    else:
        text = read_text(file.path)
        if text is None:
            left_out.append(file.name)
        yield text or "", piece.bytes


def _text_of(line: bytes, number: int, piece: Piece) -> str:
    """The text of line `number` of a piece; its number in the file is counted only where it is told."""
    name, path = piece.file
    try:
        return parse_line(line, name, path).text
    except DataError:
        number += _lines_before(piece)
    return parse_line(line, f"{name}:{number}", path).text


def _lines_before(piece: Piece) -> int:
    count = 0
    with open(piece.file.path, "rb") as file:
        while file.tell() < piece.first:
            file.readline()
            count += 1
    return count


def read_text(path: Path) -> str | None:
    """The text of a file, None when it is not UTF-8. Raises as `open_packed`."""
    with open_packed(path) as (file, _):
        try:
            return file.read().decode("utf-8")
        except UnicodeDecodeError:
            return None


def read_jsonl(path: Path, name: str) -> Iterator[Document]:
    """The documents of a JSONL file; one without a "path" is called `name:line`. Raises DataError for a bad line."""
    with open_packed(path) as (file, _):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_line(line, f"{name}:{number}", path)


def parse_line(line: bytes, name: str, path: Path) -> Document:
    """The document in one line of JSONL. Raises DataError when it is not an object with a UTF-8 "text"."""
    try:
        value = json.loads(line)
        text = value["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f'{name}: not a JSON object with a "text": {error}', field=str(path)) from error
    given = value.get("path")
    return Document(given if isinstance(given, str) else name, text)


def read_parquet(path: Path, groups: range | None = None) -> Iterator[list[str | None]]:
    """The column `text` of row groups of a Parquet file, of all without `groups`. Raises ConfigError without pyarrow,
    DataError for a file without that column, one in which it holds no text, or one that is damaged."""
    arrow = _pyarrow(path)
    from pyarrow import parquet

    with _reading(path, arrow.ArrowInvalid):
        file = parquet.ParquetFile(path)
        _check_column(arrow, file, path)
        for group in groups or range(file.num_row_groups):
            yield file.read_row_group(group, columns=["text"])["text"].to_pylist()


@contextmanager
def open_packed(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The bytes of a file, unpacked when its name ends with .gz or .zst; and the file they come from, which is read
    ahead. Raises ConfigError when .zst needs pyarrow, DataError when the file is damaged or cannot be read."""
    with _reading(path), open(path, "rb") as raw:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw), raw
        elif path.suffix == ".zst":
            arrow = _pyarrow(path)
            yield io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(raw), "zstd")), raw
        else:
            yield raw, raw


def _cut_row_groups(file: TextFile, size: int, text_bytes: int) -> Iterator[Piece]:
    arrow = _pyarrow(file.path)
    from pyarrow import parquet

    with _reading(file.path, arrow.ArrowInvalid):
        opened = parquet.ParquetFile(file.path)
        _check_column(arrow, opened, file.path)
        sizes = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
    first, taken = 0, 0
    for group, one in enumerate(sizes, start=1):
        taken += one
        if taken >= text_bytes or group == len(sizes):
            yield Piece(file, first, group, size * (group - first) // len(sizes), taken)
            first, taken = group, 0


def _check_column(arrow: ModuleType, file: object, path: Path) -> None:
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise DataError("has no column `text`", field=str(path), allowed=", ".join(schema.names))
    kind = schema.field("text").type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise DataError("its column `text` holds no text", field=str(path), value=str(kind), allowed="string")


@contextmanager
def _reading(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raises DataError for what reading a file can meet."""
    try:
        yield
    except (OSError, EOFError, zlib.error, *kinds) as error:
        raise DataError(
            f"cannot be read: {error}", field=str(path), fix="copy the file again, or leave it out"
        ) from error


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError("needs pyarrow", field="text", value=str(path), fix="pip install 'kha_train[data]'") from None
    return pyarrow
