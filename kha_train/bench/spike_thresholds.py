"""Scores the event detector at other thresholds: hits and false alarms, from which the default was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from kha_train.bench.spikes import (
    REFERENCE_NOISES,
    clean_curve,
    early_curve,
    event_detector,
    score_rules,
    spiky_curve,
)
from kha_train.stability.benchmark import Score
from kha_train.stability.events import OPEN_Z

THRESHOLDS = (7.0, 7.5, OPEN_Z, 9.0)
"""Values of z at which an event opens, including the detector's default."""
GROUPS = ("early", "reference", "mixed", "student")
COLUMNS = (
    "opens at",
    "early spikes found",
    "spikes found, normal and mixed noise",
    "false alarms per 50,000 clean steps, normal and mixed",
    "mixed alone",
    "Student t",
)


def run_thresholds(seed: int, spiky_steps: int, clean_steps: int, early_curves: int) -> dict[str, dict[str, Score]]:
    """Scores by threshold and group: `early` curves, curves of both `reference` noises, those of `mixed` noise alone,
    and those of `student`. The curves are those of `run_early` and `run_bench` of `kha_train.bench.spikes`.
    """
    rules: dict[str, Callable[[list[float]], Iterator[bool]]] = {
        f"z {z:g}": partial(event_detector, open_z=z) for z in THRESHOLDS
    }
    early = [early_curve(seed + n, noise) for n in range(early_curves) for noise in REFERENCE_NOISES]
    scores = {"early": score_rules(early, rules)}
    for noise in (*REFERENCE_NOISES, "student"):
        curves = [spiky_curve(seed, spiky_steps, noise), clean_curve(seed, clean_steps, noise)]
        scores[noise] = score_rules(curves, rules)
    scores["reference"] = {rule: merged(*(scores[noise][rule] for noise in REFERENCE_NOISES)) for rule in rules}
    return {rule: {group: scores[group][rule] for group in GROUPS} for rule in rules}


def merged(*scores: Score) -> Score:
    """The summed counts of several scores."""
    total = Score()
    for score in scores:
        total.false_alarms += score.false_alarms
        total.clean_steps += score.clean_steps
        for kind, (hits, planted) in score.found.items():
            pair = total.found.setdefault(kind, [0, 0])
            pair[0], pair[1] = pair[0] + hits, pair[1] + planted
    return total


def format_thresholds(found: dict[str, dict[str, Score]]) -> str:
    """A Markdown table with one threshold per row; false alarms with 95 % Poisson intervals."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for rule, scores in found.items():
        cells = [scores[group].in_text()[0] for group in ("early", "reference")]
        cells += [scores[group].in_text()[1] for group in ("reference", "mixed", "student")]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)
