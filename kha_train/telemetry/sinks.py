"""Sinks: mirrors of the record in other programs. `telemetry.sinks` chooses them by the names of their modules.

A sink is one file: a module of this room with a function `open_sink`, which takes a `Beginning` and returns a `Sink`.
The record does not depend on sinks, so a sink may lose what it cannot write. It never raises, and waits for nothing
slow between steps (`Guard` keeps errors away from the run).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from kha_train.config.schema import RunConfig
from kha_train.metric import Metric
from kha_train.record.schema import Parent


class Beginning(NamedTuple):
    """What a sink is opened with, on rank 0 only.

    `wandb_id` identifies the run on W&B. The attempt begins after `start_step` (0: a new run). `warn` shows a line on
    the console. `metrics` are those that the run declares. `parent` is the run that this one branched off.
    """

    config: RunConfig
    run_dir: Path
    wandb_id: str
    start_step: int
    warn: Callable[[str], None]
    metrics: Collection[Metric] = ()
    parent: Parent | None = None


class Sink:
    """What the trainer tells a sink; one that does not override a call ignores it. Values may be non-finite, and texts
    may hold secrets until the sink removes them (`record.Redactor`).
    """

    def step(self, line: dict[str, Any]) -> None:
        """A line of the record: one optimiser step."""

    def event(self, event: dict[str, Any]) -> None:
        """An event of the record; empty if it could not be recorded."""

    def spikes(
        self, events: list[dict[str, Any]], actions: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
    ) -> None:
        """At the end: all spikes of the run, what was done about them, and its losses (step, loss)."""

    def summary(self, values: dict[str, Any]) -> None:
        """At the end: the results of the run by name."""

    def close(self, exit_code: int = 0) -> None:
        """The last call. Other exit codes than 0 mean that the run failed."""


class Sinks(Sink):
    """Several sinks as one; each receives every call, in the order of `telemetry.sinks`."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def step(self, line: dict[str, Any]) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.step(line)

    def event(self, event: dict[str, Any]) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.event(event)

    def spikes(
        self, events: list[dict[str, Any]], actions: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
    ) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.spikes(events, actions, losses)

    def summary(self, values: dict[str, Any]) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.summary(values)

    def close(self, exit_code: int = 0) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.close(exit_code)


def open_sinks(beginning: Beginning) -> Sinks:
    """The sinks of `telemetry.sinks`."""
    names = beginning.config.telemetry.sinks
    return Sinks([import_module(f"kha_train.telemetry.{name}").open_sink(beginning) for name in names])
