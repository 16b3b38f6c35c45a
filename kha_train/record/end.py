"""Reads the end of a file of lines, at a cost that does not depend on the length of the file."""

from __future__ import annotations

from pathlib import Path

from kha_train.foreign.files import open_regular

PIECE = 128 * 2**10
"""Minimum number of bytes per read."""


def read_end(path: Path, lines: int = 1) -> tuple[int, bytes]:
    """(byte offset, bytes) of the end of the file `path`. It starts with a line and holds at least the last `lines`
    complete lines, and any unfinished line after them; the whole file if it has fewer.

    A missing file is empty. Raises DataError when `path` is not a file.
    """
    with open_regular(path) as file:
        if file is None:
            return 0, b""
        start, content = file.seek(0, 2), b""
        # Of n newlines, one ends a line that begins before the piece, and the last line may be torn.
        while start and content.rstrip(b"\0\n").count(b"\n") <= lines:
            begin = max(0, start - max(PIECE, len(content)))
            file.seek(begin)
            content, start = file.read(start - begin) + content, begin
    first = content.find(b"\n") + 1 if start else 0
    return start + first, content[first:]
