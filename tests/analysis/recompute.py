"""Computes the figures of a comparison again from the files of the runs, with the standard library alone.

It shares no code with the package, not even a formula in its form: definitions are those of docs/compare.md. Spikes are
counted by a plain threshold, which only fits curves whose spikes stand far out of the noise.

    python recompute.py REFERENCE_RUN... -- OTHER_RUN...
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

FAR_OUT = 2.0
UNIT = 10_000


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: float(line["train/loss"]) for line in lines_of(run)}


def last(run: Path, key: str) -> tuple[int, float] | None:
    scored = [(line["step"], float(line[key])) for line in lines_of(run) if key in line]
    return scored[-1] if scored else None


def spikes(run: Path) -> int:
    """Groups of neighbouring steps that lie far above the median of the curve."""
    curve = losses(run)
    middle = statistics.median(curve.values())
    high = sorted(step for step, loss in curve.items() if loss > middle + FAR_OUT)
    return sum(step - 1 not in high for step in high)


def of_run(run: Path) -> dict[str, Any]:
    lines = lines_of(run)
    curve = [float(line["train/loss"]) for line in lines]
    tail = [loss for loss in curve[-max(1, len(curve) // 10) :] if math.isfinite(loss)]
    seconds = [line["train/step_seconds"] for line in lines]
    total = json.loads((run / "run.json").read_text())["provenance"]["parameters"]["total"]
    return {
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "final_loss": statistics.fmean(tail),
        "validation_loss": (last(run, "validation/loss") or (0, None))[1],
        "spikes": spikes(run),
        "parameters": total,
        "step_seconds": statistics.median(seconds),
        "step_p95": statistics.quantiles(seconds, n=100, method="inclusive")[94],
        "hours": math.fsum(seconds) / 3600,
    }


def difference(reference: Path, other: Path) -> float:
    """Mean of other - reference over the last half of the common steps."""
    one, two = losses(reference), losses(other)
    common = sorted(one.keys() & two.keys())
    late = [two[step] - one[step] for step in common[len(common) // 2 :]]
    return statistics.fmean(value for value in late if math.isfinite(value))


def student(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the 95 % interval: the quantile of t by Simpson's rule and bisection."""
    count = len(values)
    mean, half = statistics.fmean(values), quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - half, mean + half


def sign_p(values: list[float]) -> float:
    """The share of all assignments of signs that split at least as unevenly."""
    count, fewer = len(values), min(sum(value < 0 for value in values), sum(value > 0 for value in values))
    splits = [number.bit_count() for number in range(2**count)]
    return sum(min(ones, count - ones) <= fewer for ones in splits) / 2**count


def quantile(freedom: int) -> float:
    """The point that Student's t exceeds with probability 2.5 %."""

    def above_zero(upper: float, pieces: int = 2000) -> float:
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        width = upper / pieces
        heights = [(1 + (number * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for number in range(pieces + 1)]
        inner = 4 * math.fsum(heights[1:-1:2]) + 2 * math.fsum(heights[2:-1:2])
        return scale * width / 3 * (heights[0] + inner + heights[-1])

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_zero(middle) < 0.475 else (low, middle)
    return (low + high) / 2


def poisson(count: int) -> tuple[float, float]:
    """The exact 95 % interval of a Poisson mean, by bisection on its distribution."""

    def at_most(number: int, mean: float) -> float:
        return math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(number + 1))

    def solve(number: int, share: float) -> float:
        low, high = 1e-12, 10.0 * count + 50
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(number, middle) > share else (low, middle)
        return (low + high) / 2

    return (solve(count - 1, 0.975) if count else 0.0), solve(count, 0.025)


def pooled(runs: list[Path]) -> dict[str, float]:
    """Spikes per `UNIT` steps of several runs with enough events: the wider of Poisson's interval and one from the
    spread of the counts.
    """
    counts, steps = [spikes(run) for run in runs], [len(losses(run)) for run in runs]
    total, exposure = sum(counts), sum(steps) / UNIT
    value = total / exposure
    expected = [total * own / sum(steps) for own in steps]
    squares = sum((count - mean) ** 2 for count, mean in zip(counts, expected, strict=True))
    error = math.sqrt(len(runs) / (len(runs) - 1) * squares) / total
    half = quantile(len(runs) - 1) * error
    low, high = (edge / exposure for edge in poisson(total))
    spread = value * math.exp(-half), value * math.exp(half + half**2 / 6)
    return {"value": value, "low": min(low, spread[0]), "high": max(high, spread[1])}


def compare(references: list[Path], others: list[Path]) -> dict[str, Any]:
    """The figures of pairs (references[i], others[i]), one a seed, of two variants."""
    pairs = list(zip(references, others, strict=True))
    differences = [difference(one, two) for one, two in pairs]
    validations = []
    for one, two in pairs:
        (_, left), (_, right) = last(one, "validation/loss"), last(two, "validation/loss")
        validations.append(right - left)
    return {
        "runs": {str(run): of_run(run) for run in (*references, *others)},
        "differences": differences,
        "over_seeds": student(differences),
        "below_zero": sum(value < 0 for value in differences),
        "sign_p": sign_p(differences),
        "validation_differences": validations,
        "validation_over_seeds": student(validations),
        "pooled": [pooled(references), pooled(others)],
    }


if __name__ == "__main__":
    cut = sys.argv.index("--")
    sides = ([Path(name) for name in part] for part in (sys.argv[1:cut], sys.argv[cut + 1 :]))
    print(json.dumps(compare(*sides), indent=2))
