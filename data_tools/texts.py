"""The texts in the user's own files: cuts a file into pieces of work, and yields the texts of a piece in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.files import LINED, LINES, PARQUET, TextFile, as_text, value_of
from data_tools.packed import open_packed, reading
from data_tools.parquet import read_parquet, row_group_bytes
from kha_train.errors import DataError

UNPACKED_TIMES = 4
"""Assumed ratio of decompressed to compressed size."""
LISTED_LINES = 20
"""This many bad lines are listed; the others are only counted."""
_BYTE_ORDER_MARK = "\ufeff"


class Document(NamedTuple):
    """One text, named by a path that is the same on every machine."""

    path: str
    text: str


class Piece(NamedTuple):
    """A part of a file: the lines in bytes [first, last) of JSONL, row groups [first, last) of Parquet, or the whole of
    a file that can only be read from the beginning. `bytes` are bytes on disk, `text_bytes` roughly those of the text.
    """

    file: TextFile
    first: int
    last: int
    bytes: int
    text_bytes: int


@dataclass
class LeftOut:
    """What was skipped while reading: the names of `files` that are not UTF-8 and, with `skip_bad_lines`, lines without
    a text.

    `bad_lines` is their number; `listed` names the first of them with the reason.
    """

    skip_bad_lines: bool = False
    files: list[str] = field(default_factory=list)
    bad_lines: int = 0
    listed: list[str] = field(default_factory=list)

    def line(self, problem: DataError) -> None:
        """Record a bad line, or raise `problem` unless bad lines are skipped."""
        if not self.skip_bad_lines:
            raise problem
        self.bad_lines += 1
        if len(self.listed) < LISTED_LINES:
            self.listed.append(problem.problem)

    def add(self, other: LeftOut) -> None:
        """Add what another reader skipped."""
        self.files += other.files
        self.bad_lines += other.bad_lines
        self.listed = (self.listed + other.listed)[:LISTED_LINES]

    def notes(self) -> list[str]:
        """What was skipped, in lines for people."""
        notes = [f"left out, not UTF-8: {name}" for name in self.files]
        if self.bad_lines:
            notes += [f"{self.bad_lines} bad lines left out", *(f"left out: {one}" for one in self.listed)]
            more = self.bad_lines - len(self.listed)
            notes += [f"and {more} more bad lines"] if more else []
        return notes


def cut(file: TextFile, text_bytes: int) -> Iterator[Piece]:
    """The pieces of a file, of about `text_bytes` each where it can be read from anywhere. Raises as `texts`."""
    size = file.path.stat().st_size
    if file.packed:
        yield Piece(file, 0, 0, size, UNPACKED_TIMES * size)
    elif file.kind == PARQUET:
        yield from _cut_row_groups(file, size, text_bytes)
    elif file.kind == LINES[0]:
        with reading(file.path), open(file.path, "rb") as lines:
            first = 0
            while first < size:
                lines.seek(min(first + text_bytes, size) - 1)
                lines.readline()
                yield Piece(file, first, lines.tell(), lines.tell() - first, lines.tell() - first)
                first = lines.tell()
    else:
        yield Piece(file, 0, 0, size, size)


def texts(piece: Piece, left_out: LeftOut, advance: Callable[[int], None]) -> Iterator[str]:
    """The non-empty texts of a piece, in order. `left_out` records what is skipped; `advance` receives bytes of the
    file, `piece.bytes` in all.

    Raises ConfigError when the file needs pyarrow and pyarrow is missing; DataError when it is damaged, cannot be read,
    or has a line or a row without text.
    """
    told = 0
    for text, at in _texts(piece, left_out):
        # Compressed input is read ahead of the output.
        if at > told:
            advance(at - told)
            told = at
        if text:
            yield text
    advance(piece.bytes - told)


def _texts(piece: Piece, left_out: LeftOut) -> Iterator[tuple[str, int]]:
    """Every text, and the bytes of the piece read to reach it."""
    file = piece.file
    if file.kind == PARQUET:
        groups = piece.last - piece.first
        for group, some in read_parquet(file, range(piece.first, piece.last)):
            yield from ((text, piece.bytes * (group - piece.first) // groups) for text in some)
    elif file.kind == LINES[0]:
        yield from _texts_of_lines(piece, left_out)
    elif file.kind == LINED:
        yield from _plain_lines(file)
    else:
        text = read_text(file.path)
        if text is None:
            left_out.files.append(file.name)
        yield text or "", piece.bytes


def _plain_lines(file: TextFile) -> Iterator[tuple[str, int]]:
    with open_packed(file.path) as (lines, raw):
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode(), raw.tell()
            except UnicodeDecodeError as error:
                raise DataError(f"{file.name}: line {number} is not UTF-8", field=str(file.path)) from error


def _texts_of_lines(piece: Piece, left_out: LeftOut) -> Iterator[tuple[str, int]]:
    file, position, before = piece.file, piece.first, None
    with open_packed(file.path) as (lines, raw):
        if not file.packed:
            lines.seek(piece.first)
        for number, line in enumerate(lines, start=1):
            position += len(line)
            if line.strip():
                try:
                    text = parse_line(line, number, file).text
                except DataError:
                    # Lines before the piece are counted only where line numbers are reported.
                    before = _lines_before(piece) if before is None else before
                    text = _parse_or_leave_out(line, before + number, file, left_out)
                yield text, raw.tell() if file.packed else position - piece.first
            if not file.packed and position >= piece.last:
                return


def _parse_or_leave_out(line: bytes, number: int, file: TextFile, left_out: LeftOut) -> str:
    try:
        return parse_line(line, number, file).text
    except DataError as error:
        left_out.line(error)
        return ""


def _lines_before(piece: Piece) -> int:
    count = 0
    with open(piece.file.path, "rb") as file:
        while file.tell() < piece.first:
            file.readline()
            count += 1
    return count


def read_text(path: Path) -> str | None:
    """The text of a file without its byte order mark; None when it is not UTF-8. Raises as `open_packed`."""
    with open_packed(path) as (file, _):
        try:
            return file.read().decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
        except UnicodeDecodeError:
            return None


def read_jsonl(file: TextFile, left_out: LeftOut) -> Iterator[Document]:
    """The documents of a JSONL file. Raises DataError for a bad line unless `left_out` skips it."""
    with open_packed(file.path) as (lines, _):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield parse_line(line, number, file)
            except DataError as error:
                left_out.line(error)


def parse_line(line: bytes, number: int, file: TextFile) -> Document:
    """The document in line `number` of JSONL. Its path is the field "path", or empty; null is an empty text. Raises
    DataError unless the line is an object with a text that UTF-8 can encode.
    """
    where = f"line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"{where} is not JSON: {error}") from error
    text = value_of(value, file.field, absent=0) if isinstance(value, dict) else 0
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise _bad(file, f"{where} is not an object with a text in the field {file.field!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(file, f"{where} holds characters that UTF-8 cannot encode: {error.reason}") from error
    path = value.get("path")
    return Document(as_text(path) if isinstance(path, str) else "", text)


def _bad(file: TextFile, problem: str) -> DataError:
    fix = "fix the line, pass --skip-bad-lines, or leave the file out"
    return DataError(f"{file.name}: {problem}", field=str(file.path), fix=fix)


def _cut_row_groups(file: TextFile, size: int, text_bytes: int) -> Iterator[Piece]:
    sizes = row_group_bytes(file)
    first, taken = 0, 0
    for group, one in enumerate(sizes, start=1):
        taken += one
        if taken >= text_bytes or group == len(sizes):
            yield Piece(file, first, group, size * (group - first) // len(sizes), taken)
            first, taken = group, 0
