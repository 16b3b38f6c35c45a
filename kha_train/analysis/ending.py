"""The summary printed when an attempt ends: a few lines for the console, figures for W&B."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kha_train.analysis.history import DATA_ID, VALIDATION_ID
from kha_train.analysis.runs import load_run
from kha_train.analysis.spikes import SpikeReport
from kha_train.analysis.spikes_trained import found_in_training
from kha_train.analysis.summary import RESULTS, Summary, printed, summarise
from kha_train.stability.events import CLASSES
from kha_train.stability.monitor import Monitor, Verdict

NOT_ACTIONS = ("spike_opened", "spike_closed", "zclip")
"""Kinds of events that are not actions, or are too many to list."""


@dataclass(frozen=True)
class Ending:
    """The results and spikes of a whole run, over all its attempts. `actions` counts the recorded interventions;
    `measured` has the last figures of named validation sets and of tasks, by the prefix of their entries.
    """

    run_dir: Path
    reached: Summary
    actions: list[dict[str, Any]]
    measured: dict[str, dict[str, float]]

    @property
    def report(self) -> SpikeReport:
        """The run's loss events."""
        return self.reached.stability

    def summary(self) -> dict[str, Any]:
        """Figures by name: `final/*` are those of `RESULTS`, with the content ids of their data; `spike/*` are the
        statistics of the spikes; then published scores.
        """
        spikes = self.report.to_dict()
        contents = {name: self.reached.told[name] for name in (DATA_ID, VALIDATION_ID)}
        figures = {**self.reached.results, **contents}
        reached = {f"final/{name}": value for name, value in figures.items() if value is not None}
        for entries, found in self.measured.items():
            reached |= {f"final/{entries}/{name}": value for name, value in found.items()}
        statistics = {**spikes["summary"], "rates": spikes["rates"]}
        return {**reached, **{f"spike/{name}": value for name, value in statistics.items()}, **spikes["scores"]}

    def rows(self, steps: int) -> list[tuple[str, str]]:
        """(name, words) for the terminal. `steps` is the planned number of steps of the run."""

        def words(name: str) -> str:
            return printed(RESULTS[name], self.reached.results[name])

        measured = self.measured.items()
        spikes, actions = self.report.summary, self.report.actions
        kinds = ", ".join(f"{spikes[f'{kind}_total']} {kind}" for kind in CLASSES)
        done = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in actions.items() if count)
        validation = f"{words('validation_loss')} nats per token, {words('bits_per_byte')} bits per byte"
        rows = [
            ("steps", f"{words('steps')} of {steps:,}, {words('tokens')} tokens"),
            ("train loss", f"{words('final_loss')} (mean of the last 10 % of the steps)"),
            ("validation", validation if self.reached.results["validation_loss"] is not None else "none"),
            *(
                (entries, ", ".join(f"{name} {value:.4f}" for name, value in found.items()) or "none")
                for entries, found in measured
            ),
            ("speed", f"{words('tokens_per_second')} tokens per second, MFU {words('mfu')} (medians)"),
            ("loss events", f"{kinds} at the end{'; ' if done else ''}{done}"),
            ("diverged", "yes" if spikes["diverged"] else "no"),
        ]
        return [*rows, ("record", str(self.run_dir))]

    def next_command(self) -> str:
        """What one would look at now."""
        return f"kha compare {shlex.quote(str(self.run_dir))}"


def end_of(run_dir: Path, diverged: bool = False, seen: tuple[Monitor, Verdict] | None = None) -> Ending:
    """Sum up the run in `run_dir`. `diverged` says that it is about to end with exit code 5, which its record does not
    hold yet; `seen` is the monitor that has judged it, and its last verdict. Raises what reading its record raises."""
    run = load_run(run_dir)
    found = found_in_training(run.run, run.columns, run.events, *seen) if seen else None
    actions = [event for event in run.events if event["kind"] not in NOT_ACTIONS]
    measured = {
        entries: {name: series.last for name, series in figures.items() if series.last is not None}
        for entries, figures in run.evaluations.items()
    }
    return Ending(run_dir, summarise(run, diverged, found), actions, measured)
