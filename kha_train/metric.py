"""Declares what a number in a run's record means, beside the code that computes it.

Everything that computes numbers for `metrics.jsonl` has an attribute `metrics`, a tuple of `Metric`: a module of the
decoder, a detector, a meter, the loop. A run collects the declarations of its parts and writes them to `run.json`. The
record, the mirrors and `kha metrics` take units, meanings and flags from there.

This file imports nothing from the package, so every room can declare metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

Combine = Literal["sum", "mean", "rms", "norm", "max", "min", "last"]
OverLayers = Literal["sum", "mean", "max", "min"]
BY_LAYER = "_by_layer"
"""The suffix of the name under which a per-layer metric is recorded as a list."""
_IN_WORDS: dict[OverLayers, str] = {
    "sum": "sum over layers", "mean": "mean over layers", "max": "largest over layers", "min": "smallest over layers",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A metric: its name in the record, its unit and its meaning.

    `timing` marks a number that depends on when and where a step ran, not on what it computed. A metric that is not
    `mirrored` stays in the record and is not sent to W&B.

    `combine` and `layers` are for modules of the decoder, which report a value for every micro-batch on every rank.
    `combine` says how these become the value of the step: `sum`; `mean` and `rms` (the root of the mean), over all
    averaged elements, so tokens have equal weight; `norm`, the root of the sum (of squares); `max`; `min`; `last`, the
    value of rank 0 in its last micro-batch. A metric with `layers` has a value for each layer that reports it. The
    values are recorded as a list under the name with the suffix `_by_layer`, which is not mirrored, and as one number,
    which `layers` computes from them.
    """

    name: str
    unit: str
    meaning: str
    timing: bool = False
    mirrored: bool = True
    combine: Combine = "last"
    layers: OverLayers | None = None

    def recorded(self) -> tuple[Metric, ...]:
        """What the record holds: the metric itself and, for a per-layer metric, also the list."""
        if self.layers is None:
            return (self,)
        one = replace(self, meaning=f"{self.meaning}; {_IN_WORDS[self.layers]}")
        listed = replace(self, name=self.name + BY_LAYER, meaning=f"{self.name} of each layer, a list", mirrored=False)
        return one, listed

    def over_layers(self, values: list[float]) -> float:
        """The one number that summarises the `values` of all layers (at least one)."""
        if any(map(math.isnan, values)):
            return math.nan
        match self.layers:
            case "sum":
                return sum(values)
            case "max":
                return max(values)
            case "min":
                return min(values)
            case _:
                return sum(values) / len(values)

    def to_plain(self) -> dict[str, Any]:
        """The value stored in `run.json` under the metric's name."""
        flags = {"timing": self.timing, "mirrored": self.mirrored}
        return {"unit": self.unit, "meaning": self.meaning, **flags}


def in_force(declarations: Iterable[Metric]) -> dict[str, Metric]:
    """The recorded metrics by name, in the order declared. Several instances of a part declare the same metrics; two
    declarations of one name must be equal.
    """
    found: dict[str, Metric] = {}
    for declared in declarations:
        for metric in declared.recorded():
            other = found.setdefault(metric.name, metric)
            assert other == metric, f"metric {metric.name} is declared twice: {other} and {metric}"
    return found
