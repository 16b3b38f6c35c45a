"""Writes a run directory: one `Record`, on rank 0 only."""

from __future__ import annotations

import os
import secrets
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from kha_train.config.compose import load_plain
from kha_train.errors import DataError, KhaError
from kha_train.foreign.files import check_regular
from kha_train.metric import Metric
from kha_train.record.attempts import CONFIG, CONFIG_FILE, config_entry
from kha_train.record.failures import FAILURES, RANKS
from kha_train.record.files import write_json
from kha_train.record.goodput import Goodput, goodput_of
from kha_train.record.jsonl import Appender, repair
from kha_train.record.lock import LOCK_FILE, OWNER_FILE, RunLock
from kha_train.record.markers import Marker, clear_marker
from kha_train.record.provenance import collect_provenance
from kha_train.record.reader import (
    DISCARDED_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    RUN_FILE,
    read_last_metrics,
    read_run,
)
from kha_train.record.redact import Redactor
from kha_train.record.rewind import (
    INTENT_FILE,
    finish_rewind,
    forget_rewind,
    pending_rewind,
    plan_rewind,
)
from kha_train.record.schema import RUN_FORMAT, OwnRunFile, Parent
from kha_train.record.tail import read_tail
from kha_train.record.totals import Totals, known_totals, save_totals, totals_of

NAMES = (CONFIG_FILE, RUN_FILE, METRICS_FILE, DISCARDED_FILE, EVENTS_FILE, INTENT_FILE, OWNER_FILE)
"""Names in a run directory that must be regular files."""
SAVE_EVERY = 50
"""Number of lines after which the totals are saved again."""
END_MARKERS = (Marker.DONE, Marker.REQUEUE, Marker.FATAL)


class Record:
    """The files of one run directory, open for writing: `open`, `begin_attempt`, `step`s and `event`s, `close`."""

    def __init__(self, run_dir: Path) -> None:
        self._new = _missing(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self._redactor = Redactor.from_environment()
        for name in NAMES:
            check_regular(run_dir / name)
        self._in_attempt = False
        self._totals: Totals | None = None
        with ExitStack() as opened:
            self._lock = RunLock(run_dir)
            opened.callback(self._lock.close)
            self._run = read_run(run_dir, OwnRunFile) or self._new_run()
            self._metrics = Appender(run_dir / METRICS_FILE)
            opened.callback(self._metrics.close)
            self._events = Appender(run_dir / EVENTS_FILE)
            opened.callback(self._events.close)
            self._recover()
            self.last_step = max(_last_step(run_dir), self.begun_after)
            # Damage outside what a start reads is found by readers of the whole curve, and at the end of the run.
            with suppress(DataError):
                self._totals = known_totals(run_dir)
            opened.pop_all()

    @classmethod
    def open(cls, run_dir: Path, rank: int = 0) -> Record:
        """The record of `run_dir`, created if needed, repaired if its last process was killed.

        On ranks other than 0 it is a `SilentRecord`. Raises RunDirectoryInUse when another process has it open, and
        DataError when one of its files is damaged or is not a regular file.
        """
        return cls(Path(run_dir)) if rank == 0 else SilentRecord(Path(run_dir))

    @property
    def run_id(self) -> str:
        """The run's id, generated once per directory."""
        return str(self._run["run_id"])

    @property
    def wandb_id(self) -> str:
        """The W&B run id, generated once per directory, so that every attempt continues the same W&B run."""
        return str(self._run["wandb_id"])

    @property
    def attempt(self) -> int:
        """Number of the current attempt; 0 before the first `begin_attempt`."""
        return len(self._run["attempts"])

    @property
    def parent(self) -> Parent | None:
        """The run that this one branched off."""
        return self._run.get("parent")

    @property
    def begun_after(self) -> int:
        """The step after which the curve of the run begins: 0, or that of the checkpoint it branched off."""
        return self.parent["step"] if self.parent else 0

    @property
    def has_steps(self) -> bool:
        """Whether the curve has a line."""
        return self.last_step > self.begun_after

    @property
    def in_attempt(self) -> bool:
        """Whether an attempt has begun here and has not ended."""
        return self._in_attempt

    def begin_attempt(
        self,
        start_step: int,
        *,
        world_size: int = 1,
        facts: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        metrics: Iterable[Metric] = (),
        parent: Parent | None = None,
    ) -> int:
        """Starts or resumes the run after `start_step` finished steps; returns the attempt's number (from 1).

        Moves lines after `start_step` to `metrics.discarded.jsonl` and removes the marker files of the last end. The
        first attempt's `facts` (such as `data_content_id`, `parameters`) join the provenance of `run.json`; differing
        facts of later attempts are kept under the attempt's `changed`. `config` is kept with the attempt. Call this
        before `config.yaml` is replaced: it is the only place that holds the configuration of an attempt of an older
        release. `metrics` are those that later lines may hold; declarations of earlier attempts are kept. Pass
        `parent` when the run begins as a branch: its curve then begins after `start_step`.
        """
        self._end_attempt("lost")
        self._keep_last_config()
        now = self._redactor.clean({**collect_provenance(self._redactor.clean), **(facts or {})})
        first = self._run["provenance"]
        attempt: dict[str, Any] = {
            "attempt": self.attempt + 1,
            "start_step": start_step,
            "world_size": world_size,
            "started": time.time(),
        }
        # A fact that holds no longer is None; a start that is given no facts changes none.
        now_or_none = now if facts is None else {**dict.fromkeys(first), **now}
        attempt["changed"] = {key: value for key, value in now_or_none.items() if first and first.get(key) != value}
        if config is not None:
            attempt[CONFIG] = config_entry(self._run["attempts"], self._redactor.clean(config))
        self._run["provenance"] = first or now
        declared = {metric.name: metric.to_plain() for metric in metrics}
        if declared:
            self._run["metrics"] = {**self._run.get("metrics", {}), **declared}
        self._run["attempts"].append({**attempt, "state": "running"})
        if parent is not None:
            self._run["parent"] = self._redactor.clean(parent)
        elif start_step < self.begun_after:
            # A branch that saved nothing begins again as no branch.
            del self._run["parent"]
            self.last_step = _last_step(self.run_dir)
        self._in_attempt = True
        self._write_run()
        for marker in END_MARKERS:
            clear_marker(self.run_dir, marker)
        self.event("attempt_started", start_step, world_size=world_size)
        # Of a run that begins, lines are those of a start that saved nothing.
        begins = parent is not None or start_step == 0
        reason = "began again: the run had no checkpoint" if begins else "resumed from an earlier checkpoint"
        self.rewind_to(0 if begins else start_step, reason)
        self.last_step = self.last_step if parent is None else start_step
        if self.last_step < start_step:
            self.event("lines_missing", start_step, after_step=self.last_step)
            self.last_step = start_step
        return self.attempt

    def step(self, line: dict[str, Any]) -> None:
        """Appends one optimiser step. `line` has `step`, larger than any before; `attempt` and `time` are added.

        Values are plain Python numbers. Units and meanings of the keys are those declared with `begin_attempt`.
        """
        assert line["step"] > self.last_step, f"step {line['step']} is already recorded (last: {self.last_step})"
        head = {"step": line["step"], "attempt": self.attempt, "time": time.time()}
        self._lock.confirm()
        clean = self._redactor.clean({**head, **line})
        self._metrics.append(clean)
        self.last_step = line["step"]
        if self._totals is not None:
            self._totals.add(clean)
            if self._totals.lines % SAVE_EVERY == 0:
                save_totals(self.run_dir, self._totals)

    def event(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        """Appends something that happened at `step` (a save, a restart, a skipped update); returns what was written."""
        head = {"id": uuid.uuid4().hex, "kind": kind, "step": step, "attempt": self.attempt, "time": time.time()}
        event: dict[str, Any] = self._redactor.clean({**head, **fields})
        self._lock.confirm()
        self._events.append(event)
        if self._totals is not None:
            self._totals.happened(event)
        return event

    def rewind_to(self, step: int, reason: str) -> int:
        """Discards every line after `step`, with `reason`; returns their number. A crash neither loses nor doubles a
        line.
        """
        told = self._redactor.text(reason)
        intent = plan_rewind(self.run_dir, step, discarded_reason=told, discarded_by_attempt=self.attempt)
        if intent is None:
            return 0
        moved = self._finish(intent)
        self.last_step = step
        if self._totals is not None:
            for line in moved:
                self._totals.undo(line, told)
            save_totals(self.run_dir, self._totals)
        return int(intent["lines"])

    def goodput(self) -> Goodput | None:
        """The goodput of the run so far, see `record.goodput`. A long record of an older release, which has no
        up-to-date totals, is read as a whole once. Raises DataError for a damaged record.
        """
        self._totals = self._totals or totals_of(self.run_dir)
        return goodput_of(self._totals, self._run["attempts"])

    def update_run(self, **fields: Any) -> None:
        """Sets top-level fields of `run.json`, such as the final result."""
        self._run.update(self._redactor.clean(fields))
        self._write_run()

    def sync(self) -> None:
        """Forces all lines to the disk. Call it before a checkpoint is published, so that no checkpoint is ahead of the
        record.
        """
        self._lock.confirm()
        self._metrics.sync()
        self._events.sync()

    def close(self, state: str = "stopped") -> None:
        """Ends the attempt with `state` (done, stopped, requeued, failed, diverged) and closes the files."""
        # An attempt that another process left open is handled by `begin_attempt`.
        try:
            if self._in_attempt:
                self._end_attempt(state)
                self._in_attempt = False
                if self._totals is not None:
                    save_totals(self.run_dir, self._totals)
            self._metrics.close()
            self._events.close()
        finally:
            self._lock.close()

    def withdraw(self) -> None:
        """Close, and remove the files and directories that opening this record created.

        For a start that is refused before its attempt begins.
        """
        assert not self._in_attempt, "an attempt leaves its record"
        with suppress(OSError):
            for path in self._new:
                if path in (self.run_dir / FAILURES, self.run_dir / RANKS):
                    shutil.rmtree(path, ignore_errors=True)
                elif path.parent == self.run_dir:
                    path.unlink(missing_ok=True)
        self.close()
        # Innermost first; a directory that somebody else has used in the meantime is not empty.
        with suppress(OSError):
            for path in self._new:
                if path == self.run_dir or path in self.run_dir.parents:
                    path.rmdir()

    def _new_run(self) -> dict[str, Any]:
        alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
        run = {
            "format": RUN_FORMAT,
            "run_id": uuid.uuid4().hex,
            "wandb_id": "".join(secrets.choice(alphabet) for _ in range(10)),
            "created": time.time(),
            "provenance": {},
            "attempts": [],
        }
        write_json(self.run_dir / RUN_FILE, run)
        return run

    def _write_run(self) -> None:
        write_json(self.run_dir / RUN_FILE, self._run)

    def _keep_last_config(self) -> None:
        """Move the configuration of an attempt of an older release from `config.yaml` to `run.json`, before this
        attempt replaces it.
        """
        attempts = self._run["attempts"]
        if not attempts or CONFIG in attempts[-1]:
            return
        try:
            saved = load_plain(self.run_dir / CONFIG_FILE)
        except KhaError:
            # A damaged file tells nothing about that attempt, and must not prevent the run from continuing.
            return
        if saved:
            attempts[-1][CONFIG] = config_entry(attempts[:-1], self._redactor.clean(saved))

    def _recover(self) -> None:
        """Finishes a rewind that a crash interrupted, and reports what was cut off the files."""
        intent = pending_rewind(self.run_dir)
        if intent is not None:
            self._finish(intent)
        torn = repair(self.run_dir / DISCARDED_FILE) + self._metrics.repaired_bytes + self._events.repaired_bytes
        if torn:
            self.event("torn_line_removed", _last_step(self.run_dir), bytes=torn)

    def _finish(self, intent: dict[str, Any]) -> list[dict[str, Any]]:
        moved = finish_rewind(self.run_dir, intent)
        # The crash may have come after the event was written. The event is recognised by its id, and is near the end.
        if not any(event.get("id") == intent["id"] for event in read_tail(self.run_dir / EVENTS_FILE).lines()):
            self.event("lines_discarded", intent["step"], id=intent["id"], lines=intent["lines"], **intent["note"])
            self._events.sync()
        forget_rewind(self.run_dir)
        return moved

    def _end_attempt(self, state: str) -> None:
        if not self._run["attempts"] or self._run["attempts"][-1]["state"] != "running":
            return
        self.event("attempt_ended", self.last_step, state=state)
        self._run["attempts"][-1] |= {"state": state, "end_step": self.last_step, "ended": time.time()}
        self._write_run()


def _last_step(run_dir: Path) -> int:
    lines = read_last_metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0


def _missing(run_dir: Path) -> list[Path]:
    """The missing paths that a start may create: in `run_dir`, then `run_dir` itself and its parents."""
    inside = [run_dir / name for name in (*NAMES, LOCK_FILE, FAILURES, RANKS)]
    return [path for path in (*inside, run_dir, *run_dir.parents) if not os.path.lexists(path)]


class SilentRecord(Record):
    """The record on ranks other than 0: the same methods, no files."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.last_step, self._in_attempt = run_dir, 0, False
        self._run = {"run_id": "", "wandb_id": "", "attempts": []}

    def begin_attempt(
        self,
        start_step: int,
        *,
        world_size: int = 1,
        facts: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        metrics: Iterable[Metric] = (),
        parent: Parent | None = None,
    ) -> int:
        """Does nothing; returns 0."""
        return 0

    def step(self, line: dict[str, Any]) -> None:
        """Does nothing."""

    def event(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        """Does nothing; returns an empty dict."""
        return {}

    def rewind_to(self, step: int, reason: str) -> int:
        """Does nothing; returns 0."""
        return 0

    def goodput(self) -> Goodput | None:
        """Always None."""
        return None

    def update_run(self, **fields: Any) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def withdraw(self) -> None:
        """Does nothing."""

    def close(self, state: str = "stopped") -> None:
        """Does nothing."""
