"""Running totals of a run, updated line by line, so that a long record is not summed up again.

`.totals.json` holds the sums and the position in each file up to which they count. It is a cache: if it does not fit
the files, or its own digest, it is ignored, and lines added later are counted. Sums are exact: integer multiples of
2^-1074, the smallest float. So lines can be subtracted again, and the order does not matter. After a kill, a resume and
a rewind, the running totals equal those of the files, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypedDict

from kha_train.errors import DataError
from kha_train.foreign.typed import LARGEST, Count, Length, Match, Range
from kha_train.record.actions import UNDONE
from kha_train.record.files import read_json, replace_json, size_of
from kha_train.record.jsonl import objects, whole_until
from kha_train.record.reader import DISCARDED_FILE, EVENTS_FILE, METRICS_FILE, read_discarded, read_events, read_metrics
from kha_train.record.schema import check_discarded, check_events, check_metrics

TOTALS_FILE = ".totals.json"
FORMAT = 1
FILES = (METRICS_FILE, DISCARDED_FILE, EVENTS_FILE)
TIMED = frozenset(("time", "attempt", "train/step_seconds", "data/wait_seconds", "train/skipped"))
"""The fields that a line needs for its time to be accounted for."""
SHORT = 8 * 2**20
"""Up to this size, new lines are counted at once, and a file's mark covers all bytes before it."""
_NEIGHBOURHOOD = 512
"""Bytes before a mark that identify it in a longer file."""
_SUMS = ("productive", "skipped", "lost", "data_wait", "checkpoint")
_DIGITS = 1074

Sum = Annotated[str, Match(r"-?[0-9a-f]{1,600}")]
Whole = Annotated[int, Range(-LARGEST, LARGEST)]


class Signs(TypedDict):
    """An attempt's signs of life: when its first step ended (`first`) and began, and when its last one ended; clock
    time in seconds.
    """

    first: float
    began: float
    last: float


class TotalsFile(TypedDict):
    """`.totals.json`."""

    format: int
    marks: Annotated[list[Annotated[list[Count], Length(2)]], Length(len(FILES))]
    lines: Count
    undone: Count
    untimed: Count
    sums: dict[str, Sum]
    attempts: dict[Annotated[str, Match("[0-9]{1,16}")], Signs]
    diverged: list[Annotated[list[Whole | None], Length(3)]]
    digest: str


@dataclass
class Totals:
    """Sums over the record. `lines` survive, `undone` lines were discarded, `untimed` lines of both lack the fields
    `TIMED`. `sums` are exact seconds, see `seconds`. `attempts` holds the signs of life by number. `diverged` holds
    attempt, step and first sample for each time the divergence guard fired in a step that no restart undid.
    """

    lines: int = 0
    undone: int = 0
    untimed: int = 0
    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0))
    attempts: dict[int, Signs] = field(default_factory=dict)
    diverged: list[tuple[int | None, ...]] = field(default_factory=list)

    def seconds(self, name: str) -> float:
        """One of the sums, rounded once: `productive`, `skipped` and `lost` steps without their wait for data,
        `data_wait` of all steps, `checkpoint` pauses. Infinite beyond the range of a float.
        """
        try:
            return self.sums[name] / (1 << _DIGITS)
        except OverflowError:
            return math.inf if self.sums[name] > 0 else -math.inf

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of the surviving curve."""
        self.lines += 1
        if self._seen(line):
            self.sums[_kind(line)] += _busy(line)

    def undo(self, line: Mapping[str, Any], reason: str) -> None:
        """Discard a line that was added before, for `reason`."""
        self.lines -= 1
        self.undone += 1
        if _is_timed(line):
            self.sums[_kind(line)] -= _busy(line)
            self.sums["lost"] += _busy(line)
        self._forget(line, reason)

    def add_undone(self, line: Mapping[str, Any]) -> None:
        """Add a discarded line that was not added before. Events of its step come first."""
        self.undone += 1
        if self._seen(line):
            self.sums["lost"] += _busy(line)
        self._forget(line, line["discarded_reason"])

    def happened(self, event: Mapping[str, Any]) -> None:
        """Add a line of the events."""
        if event["kind"] == "checkpoint_saved":
            self.sums["checkpoint"] += _exact(event.get("stall_seconds", 0.0))
        elif event["kind"] == "divergence":
            self.diverged.append(_place(event))

    def _seen(self, line: Mapping[str, Any]) -> bool:
        """Count a new line; returns whether its time is known."""
        if not _is_timed(line):
            self.untimed += 1
            return False
        self.sums["data_wait"] += _exact(line["data/wait_seconds"])
        time, began = line["time"], line["time"] - line["train/step_seconds"]
        signs = self.attempts.setdefault(line["attempt"], Signs(first=time, began=began, last=time))
        if (time, began) < (signs["first"], signs["began"]):
            signs |= {"first": time, "began": began}
        signs["last"] = max(signs["last"], time)
        return True

    def _forget(self, line: Mapping[str, Any], reason: str) -> None:
        if self.diverged and "samples_first" in line and not reason.startswith(UNDONE):
            self.diverged = [place for place in self.diverged if place != _place(line)]


def totals_of(run_dir: Path) -> Totals:
    """The totals of the files of `run_dir`, read completely. Raises DataError for a damaged record."""
    totals = Totals()
    _add_all(totals, read_metrics(run_dir), read_discarded(run_dir), read_events(run_dir))
    return totals


def known_totals(run_dir: Path) -> Totals | None:
    """The totals of `run_dir` without reading a long record: the saved totals plus the lines since; None where no saved
    totals fit. Raises DataError as `totals_of` does, where that is called.
    """
    kept = load_totals(run_dir)
    if kept is not None:
        return kept
    return totals_of(run_dir) if sum(size_of(run_dir / name) for name in FILES) <= SHORT else None


def load_totals(run_dir: Path) -> Totals | None:
    """The saved totals plus the lines since; None where none fit the files."""
    try:
        kept = read_json(run_dir / TOTALS_FILE, TotalsFile)
        if kept is None or kept["format"] != FORMAT or set(kept["sums"]) != set(_SUMS):
            return None
        if kept["digest"] != _digest(kept):
            return None
        paths = [run_dir / name for name in FILES]
        ends = [_since(path, *mark) for path, mark in zip(paths, kept["marks"], strict=True)]
        if any(end is None for end in ends):
            return None
        lines, undone, events = (objects(path, end or b"") for path, end in zip(paths, ends, strict=True))
        check_metrics(lines, METRICS_FILE)
        totals = _from_file(kept)
        _add_all(totals, lines, check_discarded(undone, DISCARDED_FILE), check_events(events, EVENTS_FILE))
    except (DataError, OSError):
        return None
    return totals


def save_totals(run_dir: Path, totals: Totals) -> None:
    """Save `totals`, which must match the files as they are now. If the disk refuses, or does not show the files, the
    next reader adds up more lines.
    """
    with suppress(OSError):
        kept: TotalsFile = {
            "format": FORMAT,
            "marks": [list(_mark(run_dir / name)) for name in FILES],
            "lines": totals.lines,
            "undone": totals.undone,
            "untimed": totals.untimed,
            "sums": {name: format(value, "x") for name, value in totals.sums.items()},
            "attempts": {str(number): signs for number, signs in totals.attempts.items()},
            "diverged": [list(place) for place in totals.diverged],
            "digest": "",
        }
        kept["digest"] = _digest(kept)
        replace_json(run_dir / TOTALS_FILE, dict(kept))


def _digest(kept: TotalsFile) -> str:
    """The digest over the other fields, so that an edited or damaged value is not believed."""
    return hashlib.sha256(json.dumps({**kept, "digest": ""}, sort_keys=True).encode()).hexdigest()


def _from_file(kept: TotalsFile) -> Totals:
    return Totals(
        lines=kept["lines"],
        undone=kept["undone"],
        untimed=kept["untimed"],
        sums={name: int(value, 16) for name, value in kept["sums"].items()},
        attempts={int(number): signs for number, signs in kept["attempts"].items()},
        diverged=[tuple(place) for place in kept["diverged"]],
    )


def _add_all(
    totals: Totals,
    lines: Iterable[Mapping[str, Any]],
    undone: Iterable[Mapping[str, Any]],
    events: Iterable[Mapping[str, Any]],
) -> None:
    for line in lines:
        totals.add(line)
    for event in events:
        totals.happened(event)
    for line in undone:
        totals.add_undone(line)


def _mark(path: Path) -> tuple[int, int]:
    """(the end of the file, a checksum of what precedes it). Raises OSError."""
    if not path.is_file():
        return 0, 0
    with path.open("rb") as file:
        end = file.seek(0, 2)
        return end, zlib.crc32(_before(file, end))


def _since(path: Path, end: int, checksum: int) -> bytes | None:
    """The complete lines after the mark; None where the file is another one, or has too much to add."""
    if not path.is_file():
        return b"" if end == 0 else None
    with path.open("rb") as file:
        if not end <= file.seek(0, 2) <= end + SHORT:
            return None
        before = _before(file, end)
        if zlib.crc32(before) != checksum or before[-1:] not in (b"", b"\n"):
            return None
        content = file.read()
    return content[: whole_until(content)]


def _before(file: BinaryIO, end: int) -> bytes:
    """The bytes that identify the mark at `end`: all of a short file, the last ones of a long file."""
    file.seek(0 if end <= SHORT else end - _NEIGHBOURHOOD)
    return file.read(end - file.tell())


def _place(line: Mapping[str, Any]) -> tuple[int | None, ...]:
    return line["attempt"], line["step"], line.get("samples_first")


def _is_timed(line: Mapping[str, Any]) -> bool:
    return line.keys() >= TIMED and all(math.isfinite(line[key]) for key in TIMED)


def _kind(line: Mapping[str, Any]) -> str:
    return "skipped" if line["train/skipped"] else "productive"


def _busy(line: Mapping[str, Any]) -> int:
    """The duration of a step without its wait for data."""
    return _exact(line["train/step_seconds"]) - _exact(line["data/wait_seconds"])


def _exact(seconds: float) -> int:
    if not math.isfinite(seconds):
        return 0
    numerator, denominator = float(seconds).as_integer_ratio()
    return numerator << (_DIGITS + 1 - denominator.bit_length())
