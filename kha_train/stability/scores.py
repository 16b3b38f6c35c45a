"""Published spike scores: the share of steps that stand out of a rolling mean.

Two of them look alike but differ. The OLMo 2 paper (arXiv 2501.00656) counts |x - mean| >= 7 sd of the previous 1,000
values, in percent. OLMo-core's monitor flags x > mean + 6 sd of the previous 128, upward only. Both let a spike into
the window that judges the next one; the event detector (`events.py`) does not. Here a non-finite value never enters a
window and counts as flagged, and nothing is judged before a window is full; the paper specifies neither.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .window import Window, usable

LONG, LONG_SIGMA = 1000, 7.0
SHORT, SHORT_SIGMA = 128, 6.0
RECENT = 10_000


@dataclass
class Share:
    """The percentage of judged steps that were flagged, over all of them and over the last `RECENT`."""

    judged: int = 0
    flagged: int = 0
    _recent: deque[int] = field(default_factory=deque)

    def add(self, flagged: bool) -> None:
        """Count one judged step."""
        self.judged += 1
        if flagged:
            self.flagged += 1
            self._recent.append(self.judged)
        while self._recent and self._recent[0] <= self.judged - RECENT:
            self._recent.popleft()

    @property
    def percent(self) -> float:
        """Percentage over all judged steps; 0 when there are none."""
        return 100.0 * self.flagged / self.judged if self.judged else 0.0

    @property
    def recent_percent(self) -> float:
        """Percentage over the last 10,000 judged steps; 0 when there are none."""
        return 100.0 * len(self._recent) / min(self.judged, RECENT) if self.judged else 0.0

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values."""
        return {"judged": self.judged, "flagged": self.flagged, "recent": list(self._recent)}

    @staticmethod
    def restore(state: dict[str, Any]) -> Share:
        """The share with the given `state`."""
        return Share(state["judged"], state["flagged"], deque(state["recent"]))


@dataclass
class SignalScores:
    """The rules above for one signal, loss or gradient norm."""

    long: Window = field(default_factory=lambda: Window(LONG))
    short: Window = field(default_factory=lambda: Window(SHORT))
    both_sides: Share = field(default_factory=Share)
    upward: Share = field(default_factory=Share)

    def update(self, value: float) -> float:
        """Add one value. Returns its z over the previous 128: nan before there are 128, inf when not finite."""
        finite = usable(value)
        if self.long.full:
            z = self.long.z(value) if finite else math.inf
            self.both_sides.add(abs(z) >= LONG_SIGMA)
            self.upward.add(z >= LONG_SIGMA)
        short_z = math.nan
        if self.short.full:
            short_z = self.short.z(value) if finite else math.inf
        if finite:
            self.long.push(value)
            self.short.push(value)
        return short_z

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values."""
        return {
            "long": self.long.values,
            "short": self.short.values,
            "both_sides": self.both_sides.state(),
            "upward": self.upward.state(),
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> SignalScores:
        """The scores with the given `state`."""
        return SignalScores(
            Window(LONG, state["long"]),
            Window(SHORT, state["short"]),
            Share.restore(state["both_sides"]),
            Share.restore(state["upward"]),
        )
