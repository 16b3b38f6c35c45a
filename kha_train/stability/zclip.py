"""ZClip (arXiv 2504.02507): clips a gradient norm that stands out of its own running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

DECAY = 0.97
THRESHOLD = 2.5
WARMUP = 25


@dataclass
class ZClip:
    """Running mean and variance of the clipped norms (decay 0.97, started from the first 25 norms)."""

    mean: float = math.nan
    variance: float = math.nan
    warmup: list[float] = field(default_factory=list)

    def limit(self, norm: float) -> float:
        """The largest norm allowed for this gradient: its own while z <= 2.5, else mean + 2.5^2 sd / z.

        Adds the (finite) norm to the statistics. Do not call it for a step that is not applied.
        """
        if len(self.warmup) < WARMUP:
            self.warmup.append(norm)
            self.mean = math.fsum(self.warmup) / len(self.warmup)
            self.variance = math.fsum((value - self.mean) ** 2 for value in self.warmup) / len(self.warmup)
            return norm
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / deviation if deviation > 0 else 0.0
        clipped = self.mean + THRESHOLD * deviation / (z / THRESHOLD) if z > THRESHOLD else norm
        self.mean = DECAY * self.mean + (1 - DECAY) * clipped
        self.variance = DECAY * self.variance + (1 - DECAY) * (clipped - self.mean) ** 2
        return clipped

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values."""
        return {"mean": self.mean, "variance": self.variance, "warmup": list(self.warmup)}

    @staticmethod
    def restore(state: dict[str, Any]) -> ZClip:
        """The clipper with the given `state`."""
        return ZClip(state["mean"], state["variance"], list(state["warmup"]))
