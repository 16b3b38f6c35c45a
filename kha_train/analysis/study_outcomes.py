"""What a finished run of a study gave: the values of its measures, and where they are from.

A run that diverged has the worst value of every measure, so an arm never wins by ending early without a spike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.analysis.history import DATA_ID
from kha_train.analysis.loss_law import law_of_run
from kha_train.analysis.runs import RunData, load_run
from kha_train.analysis.studies import Measure
from kha_train.analysis.study_heads import heads_figure
from kha_train.analysis.summary import Summary, summarise

_EVENTS = {"spikes": "spikes", "events": "events_total", "area": "area_total"}
"""Figures of events, by the kind of measure."""
SMOOTHED = 5
"""Steps whose mean loss must be at most a threshold."""


@dataclass(frozen=True)
class TrialSize:
    """How large a run was: its trained parameters, those that a token passes through, and the tokens it read."""

    parameters: int
    active_parameters: int
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What a finished run gave: the values of measures by name (None where the run has none, infinite where it never
    got there), `seconds` of its attempts, and its source: commit and SHA-256 of the `code`, content id of the data,
    when it `began` and `ended` (seconds since 1970), and on which `machine`. `size` has its parameters and tokens.
    """

    run_dir: str
    values: Mapping[str, float | None]
    diverged: bool
    seconds: float | None
    commit: str | None
    data: str | None
    began: float | None = None
    ended: float | None = None
    machine: str = ""
    code: str | None = None
    size: TrialSize | None = None


def outcome_of(run_dir: Path, measures: Sequence[Measure]) -> Outcome:
    """What the finished run in `run_dir` gave. Raises as `load_run`."""
    run = load_run(run_dir)
    summary = summarise(run)
    diverged = bool(summary.honesty["diverged"]) or summary.end_state == "diverged"
    values = {m.name: valued(m, None if diverged else _value(m, run, summary), diverged) for m in measures}
    times = [(each.get("started"), each.get("ended")) for each in run.run.get("attempts", [])]
    known = [ended - started for started, ended in times if started and ended]
    commit = run.fact("git.commit")
    origin = {key: run.fact(key) for key in ("host.system", "host.machine", "host.cpus", "device", "versions.torch")}
    return Outcome(
        run_dir=str(run_dir),
        values=values,
        diverged=diverged,
        seconds=sum(known) if len(known) == len(times) and known else None,
        commit=f"{commit} with changes" if commit and run.fact("git.dirty") else commit,
        data=run.fact(DATA_ID),
        began=min((started for started, _ in times if started), default=None),
        ended=max((ended for _, ended in times if ended), default=None),
        machine=machine_words(origin),
        code=run.fact("code_sha256"),
        size=_size(summary),
    )


def _size(summary: Summary) -> TrialSize | None:
    total, active, tokens = (summary.results[name] for name in ("parameters", "active_parameters", "tokens"))
    return TrialSize(int(total), int(active), int(tokens)) if total and active and tokens else None


def machine_words(origin: Mapping[str, Any]) -> str:
    """A machine in words, from facts of a run's origin by dotted keys; without its name."""
    words = [origin.get("host.system"), origin.get("host.machine"), origin.get("device")]
    if origin.get("host.cpus"):
        words.append(f"{origin['host.cpus']} processors")
    if origin.get("versions.torch"):
        words.append(f"torch {origin['versions.torch']}")
    return ", ".join(str(word) for word in words if word)


def valued(measure: Measure, value: float | None, diverged: bool) -> float | None:
    """The value of a measure: the worst there is where the trial diverged."""
    worst = -math.inf if measure.larger_is_better else math.inf
    return worst if diverged else value


def _value(measure: Measure, run: RunData, summary: Summary) -> float | None:
    if measure.kind == "steps_to":
        return _steps_to(run, measure.threshold)
    if measure.kind in _EVENTS:
        events = summary.stability
        if measure.kind == "area" and events.summary["nonfinite_steps"]:
            return math.inf
        return float(events.summary[_EVENTS[measure.kind]]) if events.judged else None
    if measure.kind == "late_loss":
        return _mean_loss(run, run.steps > (run.steps[-1] + run.begun_after) / 2)
    if measure.kind == "loss_at":
        tokens = run.column("tokens")
        reached = tokens[-1] >= measure.tokens * (1 - 1e-9)
        return _mean_loss(run, (tokens > 0.9 * measure.tokens) & (tokens <= measure.tokens)) if reached else None
    if measure.kind == "loss_law":
        law = law_of_run(run)
        return None if law is None or law.at_edge else law.at(measure.tokens)
    if measure.kind == "heads":
        return heads_figure(run.path, measure.entry)
    if measure.kind == "entry":
        entries, _, name = measure.entry.rpartition("/")
        series = run.evaluations.get(entries, {}).get(name)
        return None if series is None else series.last
    value: float | None = summary.results["final_loss" if measure.kind == "train_loss" else measure.kind]
    return value


def _mean_loss(run: RunData, chosen: np.ndarray) -> float | None:
    """The mean train loss of the `chosen` steps; None where none has a finite one."""
    loss = run.column("train/loss")[chosen]
    finite = loss[np.isfinite(loss)]
    return float(finite.mean()) if len(finite) else None


def _steps_to(run: RunData, threshold: float) -> float:
    """The step at which the mean loss of the last `SMOOTHED` steps is first at most `threshold`; infinite if never."""
    loss = run.column("train/loss")
    if len(loss) < SMOOTHED:
        return math.inf
    means = np.convolve(loss, np.full(SMOOTHED, 1.0 / SMOOTHED), mode="valid")
    reached = np.flatnonzero(means <= threshold)
    return float(run.steps[reached[0] + SMOOTHED - 1]) if len(reached) else math.inf
