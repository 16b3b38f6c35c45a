"""Detects a hanging rank: every rank's main thread writes heartbeats, and a thread of each rank reads those of all
ranks from files.

A rank whose main thread makes no progress for too long writes the stacks of all its threads, raises an alarm so that
the others do the same, and ends with exit code 75: try again. A rank that is stopped or lost cannot do so, but the
other ranks hang in a collective with it and name it: its last beat is the oldest.

Slow work that makes progress is not a hang. A rank reports such work (`alive`), and the ranks that wait for it see
that. A suspended process does not hang either: time counts only while the watching thread itself runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict

from kha_train.collectives import wait_for
from kha_train.distributed import World
from kha_train.errors import DataError, HangError
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import SMALL, read_regular
from kha_train.foreign.typed import Count, Source
from kha_train.record.failures import HANG, RANKS
from kha_train.record.markers import clear_path, make_folder
from kha_train.record.redact import Redactor
from kha_train.train.failure import leave_failure

_COLLECTIVES = str(Path("torch", "distributed", "distributed_c10d.py"))


class _AwakeClock:
    """Seconds in which this process ran. `tick` is called every `interval` seconds: if much more time has passed, the
    process was stopped (SIGSTOP, `scontrol suspend`, `docker pause`, a sleeping laptop), and only `interval` counts.
    """

    def __init__(self, interval: float) -> None:
        self._interval, self._last_tick, self.now = interval, time.monotonic(), 0.0

    def tick(self) -> None:
        """Another interval, or more, has passed."""
        now = time.monotonic()
        passed, self._last_tick = now - self._last_tick, now
        self.now += passed if passed < 2 * self._interval else self._interval


class Beat(TypedDict):
    """The fields of `.ranks/rank-RRRRR.json` that are read: the rank, how often it began something, made progress and
    wrote, and what it is doing.
    """

    rank: Count
    life: str
    beats: Count
    moves: Count
    written: Count
    where: str


class _Seen(NamedTuple):
    """The last beat read of a rank, and since when it has not `written` and not `moved`."""

    beat: Mapping[str, Any]
    written: float
    moved: float


class Watchdog:
    """Inside the `with` block, ends this process with exit code 75 when no rank has made progress for
    `timeout_seconds`.

    `beat` and `alive` count as progress. The time counts from the second beat on; before it, compilers and caches may
    take longer, limited by `engine.collective_timeout_seconds`. Beats are in `<run_dir>/.ranks/rank-RRRRR.json`, stacks
    in `<run_dir>/hang/rank-RRRRR.txt`, which exists only after a hang. Beats and the alarm carry the name of this
    start, because a rank of an earlier one may still be ending. Clocks are only compared with themselves: a rank is
    judged by how long its beat has not changed as seen from this rank. Raises on all ranks, when entered, if a rank
    cannot write there.
    """

    def __init__(self, run_dir: Path, world: World, timeout_seconds: float) -> None:
        self._ranks, self._hang = run_dir / RANKS, run_dir / HANG
        self._world, self._timeout = world, timeout_seconds
        self._beats, self._moves, self._step, self._doing = 0, 0, 0, "starting"
        self._clock = _AwakeClock(self._interval)
        self._moves_seen, self._moved_at = 0, 0.0
        self._written, self._seen = 0, dict[int, _Seen]()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        with self._world.agreed(f"write {self._ranks}"):
            if self._world.is_main:
                make_folder(self._ranks)
        with self._world.agreed(f"write {self._ranks}"):
            self._ranks.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            self._write_beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def beat(self, step: int, doing: str) -> None:
        """The main thread is alive and about to do `doing` at `step`."""
        self._step, self._doing = step, doing
        self._beats += 1
        self.alive()

    def alive(self) -> None:
        """The main thread's work takes long but makes progress."""
        self._moves += 1

    def _watch(self) -> None:
        while not self._left.wait(self._interval):
            self._write_beat()
            self._clock.tick()
            if self._moves != self._moves_seen:
                self._moves_seen, self._moved_at = self._moves, self._clock.now
            still = self._clock.now - self._moved_at
            if still > self._timeout / 2:
                self._look()
            if self._beats > 1 and still > self._timeout and not self._another_moves():
                self._end(f"rank {self._world.rank} has made no progress for {still:.0f} s in: {self._where()}")
            if self._alarm.exists():
                self._end("another rank raised the alarm")

    def _end(self, reason: str) -> None:
        """Write the stacks and one line, and end the process at once, because its main thread hangs."""
        first = not self._alarm.exists()
        stacks = self._hang / f"{self._name}.txt"
        with contextlib.suppress(OSError):
            make_folder(self._hang)
            self._alarm.touch()
            with stacks.open("w", encoding="utf-8") as file:
                file.write(f"{reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            _redact(stacks)
        slowest, about = self._slowest()
        error = HangError(f"{reason}; {slowest}", fix=f"start again; the stacks are in {self._hang}")
        told = {"error": Redactor.from_environment().text(error.line()), "traceback": "", "about": about}
        leave_failure(self._ranks.parent, self._world, told)
        print(f"{error.line()}", file=sys.stderr, flush=True)
        if first:
            # Ending breaks the others' connections: before that they should read the alarm and write their stacks.
            time.sleep(2 * self._interval)
        os._exit(HangError.exit_code)

    @property
    def _interval(self) -> float:
        return min(5.0, self._timeout / 4)

    def _look(self) -> None:
        """Record what every rank has written, and since when it has written nothing new."""
        for path in sorted(self._ranks.glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError, DataError):
                content, now = parse_json(read_regular(path, SMALL) or b""), self._clock.now
                beat = Source(str(path)).read(Beat, content)
                if beat["life"] != self._world.life:
                    continue
                before = self._seen.get(beat["rank"], _Seen({}, now, now))
                written = now if beat["written"] != before.beat.get("written") else before.written
                moved = now if beat["moves"] != before.beat.get("moves") else before.moved
                self._seen[beat["rank"]] = _Seen(beat, written, moved)

    def _another_moves(self) -> bool:
        """Whether a rank that this one may be waiting for makes progress. Ranks count for only half the timeout."""
        now, others = self._clock.now, [seen for rank, seen in self._seen.items() if rank != self._world.rank]
        return any(now - other.moved < 0.4 * self._timeout for other in others)

    def _slowest(self) -> tuple[str, int]:
        """The ranks that are silent, or else the one that is behind, according to their beats; and the first of
        them.
        """
        self._look()
        silent = {
            rank: f"rank {rank} does not respond, last seen in {seen.beat['where']}"
            for rank, seen in self._seen.items()
            if self._clock.now - seen.written > 0.4 * self._timeout
        }
        silent |= {rank: f"rank {rank} was never seen" for rank in range(self._world.size) if rank not in self._seen}
        if silent:
            return "; ".join(silent.values()), next(iter(silent))
        # Among ranks at the same place, the one that does not wait for another.
        beats = (seen.beat for seen in self._seen.values())
        beat = min(beats, key=lambda beat: (beat["beats"], beat.get("waits", False)))
        return f"furthest behind: rank {beat['rank']} in {beat['where']}", beat["rank"]

    def _write_beat(self) -> None:
        self._written += 1
        beat = {"rank": self._world.rank, "life": self._world.life, "beats": self._beats, "moves": self._moves}
        beat |= {"where": self._where(), "written": self._written, "waits": _main_thread_waits()}
        beside = self._beat_file.with_suffix(".new")
        with contextlib.suppress(OSError):
            beside.write_text(json.dumps(beat), encoding="utf-8")
            os.replace(beside, self._beat_file)

    def _where(self) -> str:
        return f"step {self._step}, {self._doing}"

    def _clear_leftovers(self) -> None:
        """Remove the files of an earlier start: those of this rank and, on rank 0, the alarms and the files of ranks
        that no longer exist.
        """
        # Beats of earlier releases are beside the stacks.
        leftovers = [self._beat_file, *(self._hang / f"{self._name}.{suffix}" for suffix in ("txt", "json"))]
        if self._world.is_main:
            beyond = f"rank-{self._world.size:05d}"
            found = [*self._ranks.glob("rank-*"), *self._hang.glob("rank-*")]
            leftovers += [path for path in found if path.name >= beyond]
            leftovers += self._hang.glob("ALARM*")
        for leftover in leftovers:
            if os.path.lexists(leftover):
                clear_path(leftover)
        with contextlib.suppress(OSError):
            self._hang.rmdir()

    @property
    def _name(self) -> str:
        return f"rank-{self._world.rank:05d}"

    @property
    def _beat_file(self) -> Path:
        return self._ranks / f"{self._name}.json"

    @property
    def _alarm(self) -> Path:
        return self._hang / f"ALARM-{self._world.life}"


def _redact(path: Path) -> None:
    """Stacks name paths, and faulthandler writes them itself."""
    text = path.read_text(encoding="utf-8", errors="replace")
    clean = Redactor.from_environment().text(text)
    if clean != text:
        path.write_text(clean, encoding="utf-8")


def _main_thread_waits() -> bool:
    """Whether the main thread is in a collective, according to its stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if _COLLECTIVES in frame.f_code.co_filename or frame.f_code is wait_for.__code__:
            return True
        frame = frame.f_back
    return False
