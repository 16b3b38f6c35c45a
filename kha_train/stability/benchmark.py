"""Scores any spike rule on labelled curves.

The labelled set, `labelled.jsonl`, has one curve a line: `name`, `losses` step by step from 0 (numbers of three
decimals, or "nan" and "inf"), and `planted`, the disturbances [kind, first step, last step, separable]. A separable
spike is *found* when an alarm is raised within six steps of its start. An alarm is *false* where nothing was planted
and nothing is still fading. Level shifts, drifts and overlapping spikes are not separable: alarms in them are neither
right nor wrong.

A rule of somebody else is a command. For each curve it gets the losses on standard input, one a line, and prints the
steps at which it raises an alarm, one a line, counted from 0.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CurveError
from .statistics import rate

LABELLED = Path(__file__).with_name("labelled.jsonl")
FOUND_WITHIN = 6
SETTLING = 200
"""Number of steps after a disturbance has faded in which an alarm counts neither as right nor as wrong."""
CLEAN_UNIT = 50_000

Rule = Callable[[list[float]], Sequence[int]]
"""The losses of a curve -> the steps of its alarms."""


@dataclass(frozen=True)
class Planted:
    """A disturbance: its `kind` (narrow, wide, overlapping, level_shift, drift or nan), its first step and its last."""

    kind: str
    start: int
    end: int
    separable: bool


@dataclass
class Curve:
    """Losses by step, from 0, and the disturbances inserted."""

    losses: list[float]
    planted: list[Planted] = field(default_factory=list)

    def clean_steps(self) -> list[bool]:
        """True where no disturbance was inserted and none is still fading."""
        clean = [True] * len(self.losses)
        for planted in self.planted:
            for step in range(planted.start, min(planted.end + SETTLING, len(clean))):
                clean[step] = False
        return clean


@dataclass
class Score:
    """The score of one rule: separable spikes by kind as [found, planted], the false alarms, and the number of clean
    steps.
    """

    found: dict[str, list[int]] = field(default_factory=dict)
    false_alarms: int = 0
    clean_steps: int = 0

    @property
    def recall(self) -> float:
        """Found / planted."""
        planted = sum(total for _, total in self.found.values())
        return sum(hits for hits, _ in self.found.values()) / planted if planted else math.nan

    def false_per_unit(self) -> tuple[float, float, float]:
        """False alarms per 50,000 clean steps, and the 95 % Poisson interval; all nan without a clean step."""
        found = rate(self.false_alarms, self.clean_steps / CLEAN_UNIT)
        return found["value"], found["low"], found["high"]

    def in_text(self) -> tuple[str, str]:
        """Recall and false alarms; a dash where nothing was planted, or no step was clean."""
        value, low, high = self.false_per_unit()
        recall = "-" if math.isnan(self.recall) else f"{100 * self.recall:.1f} %"
        return recall, "-" if math.isnan(value) else f"{value:.1f} ({low:.1f} to {high:.1f})"

    def add(self, curve: Curve, alarms: list[int]) -> None:
        """Count which disturbances of `curve` the `alarms` (steps) found, and the false alarms."""
        for planted in curve.planted:
            if planted.separable:
                pair = self.found.setdefault(planted.kind, [0, 0])
                pair[0] += any(planted.start <= alarm <= planted.start + FOUND_WITHIN for alarm in alarms)
                pair[1] += 1
        clean = curve.clean_steps()
        self.clean_steps += sum(clean)
        self.false_alarms += sum(clean[alarm] for alarm in alarms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        value, low, high = self.false_per_unit()
        return {
            "recall": self.recall,
            "found": {kind: list(pair) for kind, pair in self.found.items()},
            "false_alarms": self.false_alarms,
            "clean_steps": self.clean_steps,
            "false_per_50k": {"value": value, "low": low, "high": high},
        }


def read_labelled(path: Path = LABELLED) -> list[tuple[str, Curve]]:
    """The name and the curve of every line of a labelled set. Raises OSError, and CurveError for a damaged line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            planted = [
                Planted(str(kind), int(start), int(end), bool(own)) for kind, start, end, own in entry["planted"]
            ]
            found.append((str(entry["name"]), Curve([float(loss) for loss in entry["losses"]], planted)))
        except (ValueError, TypeError, KeyError) as error:
            raise CurveError("is no labelled curve", field=f"{path}, line {number}", value=str(error)) from error
    return found


def encode_labelled(name: str, curve: Curve) -> str:
    """One line of a labelled set."""
    losses = [round(loss, 3) if math.isfinite(loss) else str(loss) for loss in curve.losses]
    planted = [[one.kind, one.start, one.end, one.separable] for one in curve.planted]
    return json.dumps({"name": name, "losses": losses, "planted": planted}, separators=(",", ":"))


def score_rule(curves: Sequence[Curve], rule: Rule) -> Score:
    """`rule` on all `curves` together."""
    total = Score()
    for curve in curves:
        total.add(curve, list(rule(curve.losses)))
    return total


def command_rule(command: str) -> Rule:
    """The rule that `command` computes, started once for each curve. The rule raises CurveError when the command fails
    or prints anything but steps of the curve.
    """

    def alarms(losses: list[float]) -> list[int]:
        text = "".join(f"{loss!r}\n" for loss in losses)
        try:
            done = subprocess.run(shlex.split(command), input=text, capture_output=True, text=True, check=False)
        except (OSError, ValueError, IndexError) as error:
            raise CurveError(f"cannot be started: {error}", field="--rule", value=command) from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise CurveError(f"ended with {done.returncode}: {said}", field="--rule", value=command)
        return [_step(word, len(losses), command) for word in done.stdout.split()]

    return alarms


def _step(word: str, steps: int, command: str) -> int:
    if not word.isascii() or not word.isdecimal() or int(word) >= steps:
        allowed = f"steps from 0 to {steps - 1}, one a line"
        raise CurveError(f"printed {word[:40]!r}", field="--rule", value=command, allowed=allowed)
    return int(word)


def format_table(scores: Mapping[str, Score]) -> str:
    """The scores as a Markdown table."""
    kinds = sorted({kind for score in scores.values() for kind in score.found})
    lines = [
        f"| rule | found | {' | '.join(kinds)} | false alarms per 50,000 clean steps (95 %) |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for name, score in scores.items():
        cells = [f"{hits} of {total}" for hits, total in (score.found[kind] for kind in kinds)]
        recall, false_alarms = score.in_text()
        lines.append(f"| {name} | {recall} | {' | '.join(cells)} | {false_alarms} |")
    return "\n".join(lines)
