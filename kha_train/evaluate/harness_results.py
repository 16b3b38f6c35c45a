"""What tasks of lm-evaluation-harness came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_FILTER = "none"
"""What the harness calls answers as they are."""


@dataclass(frozen=True)
class Figure:
    """A figure and its standard error; the error is None where the harness has no formula, and both for no number."""

    value: float | None
    error: float | None


@dataclass(frozen=True)
class TaskResult:
    """What a task came to: its `version`, how many documents were scored of how many (0 for a group), the examples
    before each question, SHA-256 of all that was asked, and figures by name."""

    version: str
    samples: int
    documents: int
    shots: int
    asked: str
    figures: dict[str, Figure]


def results_of(found: Mapping[str, Any], digests: Mapping[str, str], first: Sequence[str]) -> dict[str, TaskResult]:
    """The harness's answer in our words, what was chosen first."""
    names = sorted(found["results"], key=lambda name: name not in first)
    return {
        name: TaskResult(
            str(found["versions"].get(name)),
            found["n-samples"].get(name, {}).get("effective", 0),
            found["n-samples"].get(name, {}).get("original", 0),
            int(found["n-shot"].get(name) or 0),
            digests.get(name, ""),
            _figures(found["results"][name]),
        )
        for name in names
    }


def _figures(values: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by name. A key of the harness is a metric, for errors with `_stderr` behind it, a comma and a filter."""
    figures = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name = metric if filtered == NO_FILTER else f"{metric}_{filtered}"
            figures[name] = Figure(_number(value), _number(values.get(f"{metric}_stderr,{filtered}")))
    return figures


def _number(value: Any) -> float | None:
    """As a number; None for the words that stand for none."""
    return None if isinstance(value, str) or value is None else float(value)
