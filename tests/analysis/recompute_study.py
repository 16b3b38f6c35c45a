"""Computes the intervals of studies again from the values of their runs, with the standard library alone.

It shares no code with the package. With --runs, the losses and steps themselves are computed again from
metrics.jsonl of the runs, which `result.json` names.

    python -m tests.analysis.recompute_study docs/results/copy-cpu.json [--runs FOLDER]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.analysis.recompute import losses, of_run, sign_p, student


def recomputed(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By (arm, measure): the paired differences to the reference by seed; where all are finite, their mean with the
    95 % interval of Student; and the sign test. By (two pairs, measure) the same for the differences between gains.
    """
    found = {}
    for name, arm in result["arms"].items():
        if not arm["reference"]:
            continue
        other = result["arms"][arm["reference"]]
        for measure in (one["name"] for one in result["measures"]):
            ours, theirs = ({seed: float(value) for seed, value in side["values"][measure].items() if value is not None}
                            for side in (arm, other))  # fmt: skip
            found[name, measure] = paired(ours, theirs)
    for one in result.get("gains", []):
        arm, other = (found[one[side].strip("()").split(" - ")[0], one["measure"]] for side in ("arm", "reference"))
        found[f"{one['arm']} - {one['reference']}", one["measure"]] = paired(arm["differences"], other["differences"])
    return found


def paired(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """The differences of two by seed, the interval where all values are finite, and the sign test."""
    pairs = {seed: (ours[seed], theirs[seed]) for seed in ours if seed in theirs}
    differences = {seed: 0.0 if a == b else a - b for seed, (a, b) in pairs.items()}
    finite = all(math.isfinite(value) for pair in pairs.values() for value in pair)
    signed = [value for value in differences.values() if value]
    return {
        "differences": differences,
        "interval": student(list(differences.values())) if finite and len(pairs) > 1 else None,
        "sign_test": min(1.0, sign_p(signed)) if signed else None,
    }


def from_records(result: dict[str, Any], runs: Path) -> dict[tuple[str, str, str], float]:
    """By (arm, measure, seed): losses and steps to a threshold, from the records under `runs`. A run that diverged by
    `result` is left out.
    """
    found = {}
    for name, arm in result["arms"].items():
        for seed, directory in zip(arm["seeds"], arm["runs"], strict=True):
            run = runs / Path(directory).name
            for measure in result["measures"]:
                value = arm["values"][measure["name"]][str(seed)]
                if measure["kind"] == "train_loss" and math.isfinite(float(value)):
                    found[name, measure["name"], str(seed)] = of_run(run)["final_loss"]
                elif measure["kind"] == "steps_to":
                    found[name, measure["name"], str(seed)] = steps_to(run, measure["threshold"])
    return found


def steps_to(run: Path, threshold: float) -> float:
    """The step that ends the first five whose mean loss is at most `threshold`."""
    curve = losses(run)
    steps = sorted(curve)
    for end in range(5, len(steps) + 1):
        if statistics.fmean(curve[step] for step in steps[end - 5 : end]) <= threshold:
            return float(steps[end - 1])
    return math.inf


if __name__ == "__main__":
    known = json.loads(Path(sys.argv[1]).read_text())
    for (arm, measure), one in recomputed(known).items():
        print(arm, measure, one["interval"], "sign test", one["sign_test"])
    if "--runs" in sys.argv:
        for key, value in from_records(known, Path(sys.argv[sys.argv.index("--runs") + 1])).items():
            print(*key, value)
