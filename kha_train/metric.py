"""What a number in the record of a run means, declared beside the code that computes it.

Everything that computes numbers for `metrics.jsonl` has an attribute `metrics`, a tuple of `Metric`: a module of the
decoder, a detector, a meter, the loop. A run collects the declarations of the parts it is built of and writes them to
`run.json`. The record, the mirrors and `kha metrics` take units, meanings and flags from there.

This file imports nothing of the package, so that every room can declare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

Combine = Literal["sum", "mean", "rms", "norm", "max", "min", "last"]
OverLayers = Literal["sum", "mean", "max", "min"]
BY_LAYER = "_by_layer"
"""The end of the name under which a metric of layers is recorded as a list."""
_IN_WORDS: dict[OverLayers, str] = {
    "sum": "sum over layers", "mean": "mean over layers", "max": "largest over layers", "min": "smallest over layers",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A metric: its name in the record, its unit, and what it means.

    `timing` marks a number that depends on when and where a step ran, not on what it computed. Without `mirrored` it
    stays in the record, where W&B does not see it.

    The last two are for modules of the decoder, which report a value for every micro-batch on every rank. `combine`
    says how these become the value of the step: `sum`; `mean` and `rms` (the root of the mean), of all elements that
    were averaged, so tokens have equal weight; `norm`, the root of the sum (of squares); `max`; `min`; `last`, the
    value of rank 0 in its last micro-batch. A metric with `layers` has a value for each layer that reports it: the
    values are recorded as a list under the name with `_by_layer`, which is not mirrored, and as one number that
    `layers` makes of them.
    """

    name: str
    unit: str
    meaning: str
    timing: bool = False
    mirrored: bool = True
    combine: Combine = "last"
    layers: OverLayers | None = None

    def recorded(self) -> tuple[Metric, ...]:
        """What stands in the record: the metric itself, and of a metric of layers the list too."""
        if self.layers is None:
            return (self,)
        one = replace(self, meaning=f"{self.meaning}; {_IN_WORDS[self.layers]}")
        listed = replace(self, name=self.name + BY_LAYER, meaning=f"{self.name} of each layer, a list", mirrored=False)
        return one, listed

    def over_layers(self, values: list[float]) -> float:
        """The one number that stands for the `values` of all layers, at least one."""
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
        """What `run.json` holds under the metric's name."""
        flags = {"timing": self.timing, "mirrored": self.mirrored}
        return {"unit": self.unit, "meaning": self.meaning, **flags}


def in_force(declarations: Iterable[Metric]) -> dict[str, Metric]:
    """The metrics that stand in the record, by name, in the order declared. A part that is there several times declares
    the same several times; two declarations of one name must be equal."""
    found: dict[str, Metric] = {}
    for declared in declarations:
        for metric in declared.recorded():
            other = found.setdefault(metric.name, metric)
            assert other == metric, f"metric {metric.name} is declared twice: {other} and {metric}"
    return found
