"""The TensorBoard mirror of the record, and the only user of tensorboard. Training continues whatever fails here.

Each attempt writes one event file under `<run_dir>/tensorboard`. Look at one or many runs with `tensorboard --logdir
runs`. Steps that a resume or a rewind undoes disappear from the curves, as in the record: TensorBoard drops the points
of a run from the step on at which a later session starts.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from kha_train.config.build import to_plain
from kha_train.foreign.documents import as_yaml
from kha_train.record import Redactor
from kha_train.record.metrics import record_only
from kha_train.telemetry.guard import Guard
from kha_train.telemetry.sinks import Beginning, Sink

FOLDER = "tensorboard"
FLUSH_SECONDS = 5.0
"""Curves on the disk are at most this old."""
HAPPENED = "events/"
"""Prefix before the kind of an event: the loss at the step of the event."""
MAX_ROWS = 1000
"""Maximum rows of a table; the record has all of them."""


class TensorBoardMirror(Sink):
    """Writes every metrics line as scalars at its own step; settings, spikes and results as texts.

    Written synchronously to a file of its own, some microseconds a number, so an error is met where it happens: the
    first one ends the mirror with a warning.
    """

    def __init__(self, beginning: Beginning) -> None:
        self._warn, self._left_out, self._failed = beginning.warn, record_only(beginning.metrics), False
        self._redactor = Redactor.from_environment()
        self._file: Any = None
        self._step, self._loss, self._flushed = beginning.start_step, math.nan, time.monotonic()
        self._guarded(lambda: self._open(beginning))

    def step(self, line: dict[str, Any]) -> None:
        """See `Sink.step`."""
        self._step, self._loss = line["step"], line.get("train/loss", math.nan)
        numbers = {
            name: float(value) for name, value in line.items() if isinstance(value, Real) and name not in self._left_out
        }
        self._guarded(lambda: self._scalars(numbers, self._step, line.get("time")))

    def event(self, event: dict[str, Any]) -> None:
        """See `Sink.event`: a mark at the loss of the last step; a rewind's is at the step after which it continues."""
        if not event:
            return
        if event["kind"] == "rewind":
            # First, because TensorBoard drops all that came before it at later steps, marks too.
            self._step = event["to_step"]
            self._guarded(lambda: self._begin_session(self._step + 1))
        mark = {HAPPENED + str(event["kind"]): float(self._loss)}
        self._guarded(lambda: self._scalars(mark, self._step, event.get("time")))

    def spikes(
        self, events: list[dict[str, Any]], actions: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
    ) -> None:
        """See `Sink.spikes`."""
        self._guarded(lambda: self._text("spike/events", _table(events)))
        self._guarded(lambda: self._text("spike/actions", _table(actions)))

    def summary(self, values: dict[str, Any]) -> None:
        """See `Sink.summary`."""
        self._guarded(lambda: self._text("summary", _table([{"name": key, "value": values[key]} for key in values])))

    def close(self, exit_code: int = 0) -> None:
        """See `Sink.close`."""
        self._guarded(lambda: self._file.close())
        self._file = None

    def _guarded(self, act: Callable[[], None]) -> None:
        """Run `act` unless an earlier call failed."""
        if self._failed:
            return
        guard = Guard()
        with guard:
            act()
        if guard.reason:
            self._file, self._failed = None, True
            self._warn(f"TensorBoard is disabled from here on: {self._redactor.text(guard.reason)}")

    def _open(self, beginning: Beginning) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = beginning.run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter((folder / name).open("xb"))
        self._write(0, file_version="brain.Event:2")
        self._begin_session(beginning.start_step + 1)
        settings = as_yaml(self._redactor.clean(to_plain(beginning.config)))
        # Four spaces make it a block of code in Markdown.
        self._text("config", "".join(f"    {line}\n" for line in settings.splitlines()))

    def _begin_session(self, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def _scalars(self, numbers: dict[str, float], step: int, when: float | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, when, summary=Summary(value=values))

    def _text(self, name: str, markdown: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(self._step, summary=text_pb(name, self._redactor.text(markdown)))

    def _write(self, step: int, when: float | None = None, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time() if when is None else when, step=step, **content)
        self._file.write(event.SerializeToString())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


def open_sink(beginning: Beginning) -> TensorBoardMirror:
    """The sink `tensorboard`."""
    return TensorBoardMirror(beginning)


def _table(rows: list[dict[str, Any]]) -> str:
    """`rows` with the same keys as a table in Markdown."""
    if not rows:
        return "none"
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows[-MAX_ROWS:])]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
