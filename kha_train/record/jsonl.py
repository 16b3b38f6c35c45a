"""Files with one JSON object per line that survive `kill -9`: appended by single writes, repaired when opened.

JSON has no NaN or infinity: such floats are written as the strings "nan", "inf", "-inf" and read back as floats. Text
with one of these spellings is written with a leading backslash, which is removed when it is read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from kha_train.errors import DataError
from kha_train.foreign.documents import MAX_DEPTH, Json, parse_json
from kha_train.foreign.files import read_regular
from kha_train.record.end import read_end

NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_WORDS = (b'"nan"', b'"inf"', b'"-inf"')
_SPELLED = re.compile(r"\\*(?:nan|inf|-inf)")
"""Text that needs one more backslash, so that it does not read back as a number or as other such text."""
LONE_SURROGATES = "backslashreplace"
"""Error handler for encoding text: a lone surrogate, which UTF-8 cannot encode, becomes its JSON escape."""

AT_ONCE = 1000
"""Lines parsed in one call."""


def words(value: Json) -> Json:
    """`value` with every non-finite float, at any depth, replaced by its word, for readers that expect the word."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: words(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [words(item) for item in value]
    return value


def encode(value: Json) -> Json:
    """`value` as files hold it; `decode` restores it. Non-finite floats become words, text that spells such a word gets
    a leading backslash, and tuples become lists.
    """
    if isinstance(value, str):
        return f"\\{value}" if _SPELLED.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return words(value)


def decode(value: Json) -> Json:
    """The inverse of `encode`: the words nan, inf and -inf, at any depth, become floats again."""
    if isinstance(value, str):
        return NONFINITE[value] if value in NONFINITE else value[1:] if _SPELLED.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def to_line(record: dict[str, Any]) -> bytes:
    """One line of the file, including the newline. Finite floats read back bit for bit."""
    return (json.dumps(encode(record), allow_nan=False, ensure_ascii=False) + "\n").encode(errors=LONE_SURROGATES)


def parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None when the line is not a complete JSON object."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    return decode(record) if _may_have_words(line) else record


def parse_all(lines: Sequence[bytes]) -> list[dict[str, Any] | None]:
    """`parse` of every line, at half the cost: JSON parses many objects in one call."""
    return [record for start in range(0, len(lines), AT_ONCE) for record in _parsed(lines[start : start + AT_ONCE])]


def _parsed(lines: Sequence[bytes]) -> list[dict[str, Any] | None]:
    """`parse` of every line. A separator that no line can contain, because it is made up here, stands between the
    lines. It exposes a line that holds two objects, and an object that spans two lines.
    """
    between = secrets.token_hex(16)
    joined = f',"{between}",'.encode().join(lines)
    try:
        found = json.loads(f"[{joined.decode()}]")
    except (ValueError, RecursionError):
        return [parse(line) for line in lines]
    records: list[dict[str, Any] | None] = found[::2]
    one_each = len(found) == 2 * len(lines) - 1 and found[1::2].count(between) == len(lines) - 1
    if not one_each or any(type(record) is not dict for record in records):
        return [parse(line) for line in lines]
    has_words = _may_have_words(joined)
    for place, line in enumerate(lines):
        if (has_words and _may_have_words(line)) or line.count(b"{") + line.count(b"[") > MAX_DEPTH:
            records[place] = parse(line)
    return records


def _may_have_words(text: bytes) -> bool:
    """Whether `text` may hold a non-finite number, which is rare. Letters may be written as escapes."""
    return b"\\" in text or any(word in text for word in _WORDS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file that may be growing; an unfinished last line is left out, and a missing file is
    empty.

    Raises DataError for any other line that is not a JSON object, and when `path` is not a file.
    """
    content = read_regular(path) or b""
    return objects(path, content[: whole_until(content)])


def whole_until(content: bytes) -> int:
    """The offset of a last line that a crash left unfinished, or of a run of NUL bytes; otherwise the end of `content`.

    A torn line is not JSON, or is an object without its newline. Any other JSON was written by another program.
    """
    written = content.rstrip(b"\0\n")
    last = written[written.rfind(b"\n") + 1 :]
    ends_in_newline = content[len(written) : len(written) + 1] == b"\n"
    try:
        is_torn = isinstance(parse_json(last), dict) and not ends_in_newline
    except ValueError:
        is_torn = True
    return len(written) - len(last) if is_torn else len(written) + ends_in_newline


def whole_blocks(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, complete lines of about `size` bytes) of a file that may be growing, beginning with the line at
    `start`.

    Leaves out the same unfinished end as `read_lines`.
    """
    file.seek(start)
    content = file.read(size)
    while following := file.read(size):
        end = content.rstrip(b"\0\n").rfind(b"\n") + 1
        if end:
            yield start, content[:end]
        content, start = content[end:] + following, start + end
    if end := whole_until(content):
        yield start, content[:end]


def objects(path: Path, content: bytes, number: int = 1) -> list[dict[str, Any]]:
    """The objects on the lines of `content`; its first line is line `number` of the file `path`. Raises DataError
    naming the first line that is not a JSON object.
    """
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    records = parse_all(lines) if lines else []
    if None in records:
        place = records.index(None)
        raise DataError(
            "this line is not a JSON object",
            field=f"{path}:{number + place}",
            value=lines[place][:80].decode(errors="replace"),
            fix="delete the line, or restore the file from a copy",
        )
    return [record for record in records if record is not None]


def repair(path: Path) -> int:
    """Cuts off the unfinished last line of `path` that a killed process left; returns the number of bytes removed.

    Raises DataError, and cuts nothing, when the line before it is not a JSON object either, or `path` is not a file.
    """
    start, content = read_end(path)
    end = whole_until(content)
    if end and parse(content[content.rfind(b"\n", 0, end - 1) + 1 : end]) is None:
        # There may be worse damage before it; the error names the first such line.
        objects(path, (read_regular(path) or b"")[: start + end])
    if end < len(content):
        os.truncate(path, start + end)
    return len(content) - end


class Appender:
    """A file of JSON lines open for appending. Each line is one unbuffered write, so a killed process tears at most
    one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repaired_bytes = repair(path)
        self._file = path.open("ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line. On return the kernel has it; after `sync` the disk has it.

        Raises OSError when the whole line does not fit (a full disk); no part of it then stays in the file.
        """
        line, before = to_line(record), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise

    def sync(self) -> None:
        """Forces everything written so far to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes; closing twice is harmless."""
        if not self._file.closed:
            self.sync()
            self._file.close()
