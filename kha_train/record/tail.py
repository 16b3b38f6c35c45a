"""Reads single lines of a long file of JSON lines: its last ones, or the one of a given step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from kha_train.errors import DataError
from kha_train.record.end import PIECE, read_end
from kha_train.record.jsonl import objects, parse, whole_until

T = TypeVar("T")


@dataclass(frozen=True)
class Tail:
    """The end of the file `path`: its bytes from `start`, the beginning of a line. An unfinished last line is in
    `content` but not in the lines.
    """

    path: Path
    start: int
    content: bytes

    @property
    def whole(self) -> int:
        """How many bytes of `content` are complete lines."""
        return whole_until(self.content)

    def lines(self) -> list[dict[str, Any]]:
        """The objects on the complete lines. Raises DataError naming the first line that is not one."""
        return self.numbered(lambda first: objects(self.path, self.content[: self.whole], first))

    def numbered(self, check: Callable[[int], T]) -> T:
        """The result of `check`, called with the number of the first line. Only errors need that number, so it is
        counted only when there is one.
        """
        try:
            return check(1)
        except DataError:
            if self.start == 0:
                raise
            with self.path.open("rb") as file:
                return check(1 + file.read(self.start).count(b"\n"))


def read_tail(path: Path, lines: int = 1) -> Tail:
    """The end of the file `path`, as `read_end` has it."""
    return Tail(path, *read_end(path, lines))


def line_at(path: Path, step: int) -> dict[str, Any] | None:
    """The line of `step` in the record `path`, found by bisection, since steps increase. None where there is none.

    Raises DataError where a line on the way is not a JSON object with a step.
    """
    tail = read_tail(path)
    low, high = 0, tail.start + tail.whole
    if high == 0:
        return None
    with path.open("rb") as file:
        while high - low > PIECE:
            middle = (low + high) // 2
            begin, line = _line_from(file, middle)
            if begin >= high or _step(path, line) > step:
                high = middle
            else:
                low = begin
        file.seek(low)
        # The line that contains the previous middle begins before it.
        lines = file.read(high - low).split(b"\n")
        lines[-1] += file.readline()
    found = (record for record in map(parse, lines) if record is not None and record.get("step") == step)
    return next(found, None)


def _line_from(file: BinaryIO, at: int) -> tuple[int, bytes]:
    """(byte offset, line) of the first line that begins at or after byte `at`."""
    file.seek(max(0, at - 1))
    skipped = file.readline() if at else b""
    return max(0, at - 1) + len(skipped), file.readline()


def _step(path: Path, line: bytes) -> int:
    record = parse(line)
    step = record.get("step") if record is not None else None
    if type(step) is not int:
        fix = "delete the line, or restore the file from a copy"
        raise DataError("this line has no step", field=str(path), value=line[:80].decode(errors="replace"), fix=fix)
    return step
