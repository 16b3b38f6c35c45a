"""Detects a run that has diverged: a loss at twice its own mean (llm-foundry's rule), or only non-finite steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .window import Window, usable

WINDOW = 100
FACTOR = 2.0
IN_A_ROW = 5


@dataclass
class DivergenceGuard:
    """Fires when the loss is at least twice the mean of the 100 values before it, five steps in a row.

    The values of such a sequence do not enter the mean while it lasts. The guard fires once per sequence.
    """

    window: Window = field(default_factory=lambda: Window(WINDOW))
    in_a_row: int = 0
    nonfinite_in_a_row: int = 0
    held_back: list[float] = field(default_factory=list)

    def update(self, loss: float, finite: bool) -> bool:
        """Add one step, `finite` when it could be applied; returns whether the loss rule fires here."""
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        if not usable(loss):
            return False
        if self.window.full and loss >= FACTOR * self.window.mean:
            self.in_a_row += 1
            self.held_back = [*self.held_back, loss][-IN_A_ROW:]
            return self.in_a_row == IN_A_ROW
        for value in [*self.held_back, loss] if self.in_a_row < IN_A_ROW else [loss]:
            self.window.push(value)
        self.in_a_row, self.held_back = 0, []
        return False

    def rebase(self) -> None:
        """Forget the baseline: the loss rule is silent for the next 100 finite steps."""
        self.window, self.in_a_row, self.held_back = Window(WINDOW), 0, []

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values."""
        return {
            "window": self.window.values,
            "in_a_row": self.in_a_row,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "held_back": list(self.held_back),
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> DivergenceGuard:
        """The guard with the given `state`."""
        return DivergenceGuard(
            Window(WINDOW, state["window"]), state["in_a_row"], state["nonfinite_in_a_row"], list(state["held_back"])
        )
