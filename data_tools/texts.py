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
from typing import IO, Any, NamedTuple

from kha_train.errors import ConfigError, DataError

PACKED = (".gz", ".zst")
SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".md", ".py", ".rst", ".txt") for packed in ("", *PACKED)) + (
    ".parquet",
)
UNPACKED_TIMES = 4
"""Packed text is taken to be so many times as long as its file."""


class Document(NamedTuple):
    """One text, named by a path that is the same on every machine."""

    path: str
    text: str


class TextFile(NamedTuple):
    """A file, its name (its POSIX path from the name of its root on), and where its texts are (`field`: the field of a
    line of JSONL, the column of Parquet)."""

    name: str
    path: Path
    field: str = "text"

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


class Found(NamedTuple):
    """Files of text, and how many files of other kinds lie beside them."""

    files: list[TextFile]
    others: int


def find_files(roots: Sequence[str | Path], option: str, field: str = "text") -> Found:
    """The files of `roots`, files or directories, each directory's by name; in a directory those of `SUFFIXES`. No link
    to a directory is followed. `option` is the one that named them, `field` that of the text in a file.

    Raises ConfigError for a root that is missing or is a file of another kind, and for two of one name.
    """
    found: list[TextFile] = []
    others = 0
    names: set[str] = set()
    for given in roots:
        root = Path(given).resolve()
        if root.name in names:
            raise ConfigError("two roots of one name", field=option, value=root.name, fix="rename one")
        names.add(root.name)
        if root.is_dir():
            inside = [Path(folder, name) for folder, _, files in os.walk(root) for name in files]
            named = ((f"{root.name}/{path.relative_to(root).as_posix()}", path) for path in inside)
            texts = [TextFile(*one, field) for one in sorted(named) if one[1].name.endswith(SUFFIXES)]
            found += texts
            others += len(inside) - len(texts)
        elif not root.exists():
            raise ConfigError("no such file or directory", field=option, value=str(given))
        elif root.name.endswith(SUFFIXES):
            found.append(TextFile(root.name, root, field))
        else:
            raise ConfigError("a file of another kind", field=option, value=str(given), allowed=" ".join(SUFFIXES))
    return Found(found, others)


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
        for number, group in enumerate(read_parquet(file, range(piece.first, piece.last)), start=1):
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
    try:
        return parse_line(line, number, piece.file).text
    except DataError:
        number += _lines_before(piece)
    return parse_line(line, number, piece.file).text


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


def read_jsonl(file: TextFile) -> Iterator[Document]:
    """The documents of a JSONL file. Raises DataError for a bad line."""
    with open_packed(file.path) as (lines, _):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parse_line(line, number, file)


def parse_line(line: bytes, number: int, file: TextFile) -> Document:
    """The document in line `number` of JSONL, its path that of its field "path", or empty; null is an empty text.
    Raises DataError when the line is not an object with a text that UTF-8 can express."""
    where = f"line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"{where} is not JSON: {error}") from error
    text = value.get(file.field, 0) if isinstance(value, dict) else 0
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise _bad(file, f"{where} is not an object with a text in the field {file.field!r}")
    path = value.get("path")
    try:
        text.encode()
        return Document(path if isinstance(path, str) and path.encode() else "", text)
    except UnicodeEncodeError as error:
        raise _bad(file, f"{where} holds what UTF-8 cannot express: {error.reason}") from error


def _bad(file: TextFile, problem: str) -> DataError:
    return DataError(f"{file.name}: {problem}", field=str(file.path), fix="mend the line, or leave the file out")


def read_parquet(file: TextFile, groups: range | None = None) -> Iterator[list[str | None]]:
    """The texts of row groups of a Parquet file, of all without `groups`. Raises ConfigError without pyarrow, DataError
    for a file without their column, one in which it holds no text, or one that is damaged."""
    arrow = _pyarrow(file.path)
    from pyarrow import parquet

    with _reading(file.path, ValueError):
        opened = parquet.ParquetFile(file.path)
        _check_column(arrow, opened, file)
        for group in groups or range(opened.num_row_groups):
            yield opened.read_row_group(group, columns=[file.field])[file.field].to_pylist()


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

    with _reading(file.path, ValueError):
        opened = parquet.ParquetFile(file.path)
        _check_column(arrow, opened, file)
        sizes = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
    first, taken = 0, 0
    for group, one in enumerate(sizes, start=1):
        taken += one
        if taken >= text_bytes or group == len(sizes):
            yield Piece(file, first, group, size * (group - first) // len(sizes), taken)
            first, taken = group, 0


def _check_column(arrow: ModuleType, opened: Any, file: TextFile) -> None:
    schema = opened.schema_arrow
    if schema.names.count(file.field) != 1:
        problem = f"has not one column {file.field!r}"
        raise DataError(problem, field=str(file.path), allowed=", ".join(schema.names))
    kind = schema.field(file.field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise DataError(f"its column {file.field!r} holds no text", field=str(file.path), value=str(kind))


@contextmanager
def _reading(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raises DataError for what reading a file can meet."""
    try:
        yield
    except (OSError, EOFError, zlib.error, *kinds) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot be read: {reason}", field=str(path), fix="copy it again, or leave it out") from error


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError("needs pyarrow", field="text", value=str(path), fix="pip install 'kha_train[data]'") from None
    return pyarrow
