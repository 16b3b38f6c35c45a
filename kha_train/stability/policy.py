"""How the run reacts to a bad step. The decision depends on the `Verdict` alone, so ranks with the same loss and the
same norm decide alike.

| policy | a step that is not finite | a flagged finite step | a lasting event, a diverged loss |
|---|---|---|---|
| observe | discarded | applied | reported |
| skip | discarded | discarded, at most `max_skips` in a row | reported |
| rewind | discarded | applied | rewind to a checkpoint and skip the data; at most `max_rewinds` times, then abort |
| abort | discarded | applied | a lasting event is reported, a diverged loss ends the run |

Under every policy `max_nonfinite_steps` non-finite steps in a row end the run (`rewind` first tries to rewind).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .monitor import Verdict
from .scores import SHORT_SIGMA

PolicyName = Literal["observe", "skip", "rewind", "abort"]


class Decision(NamedTuple):
    """Whether to `apply` the update or discard it, and what to do `then`: go on, rewind or abort. `reason` is empty for
    a normal step.
    """

    apply: bool
    then: Literal["go on", "rewind", "abort"] = "go on"
    reason: str = ""


@dataclass
class Policy:
    """`name` and its limits; the counters are its state.

    `rewind_after` is how many steps an event may stay open before the run rewinds. `rewinds` counts the rewinds so far;
    a rewind does not reset it.
    """

    name: PolicyName
    max_nonfinite_steps: int
    max_skips: int
    rewind_after: int
    max_rewinds: int
    skips_in_a_row: int = 0
    rewinds: int = 0

    def decide(self, verdict: Verdict) -> Decision:
        """The decision about the step of `verdict`, before the optimiser sees it."""
        lost = self._lost(verdict)
        if lost and self.name == "rewind":
            if self.rewinds < self.max_rewinds:
                return Decision(False, "rewind", lost)
            return Decision(False, "abort", f"{lost}, after {self.rewinds} rewinds")
        if verdict.nonfinite_in_a_row >= self.max_nonfinite_steps:
            return Decision(False, "abort", lost)
        if not verdict.finite:
            return Decision(False, reason="not finite")
        if self.name == "abort" and verdict.diverged:
            return Decision(False, "abort", lost)
        if self.name == "skip":
            return self._skip(verdict)
        return Decision(True)

    def without_rewind(self, verdict: Verdict) -> Decision:
        """What to do when there is no checkpoint to rewind to; the step has been discarded."""
        ends = verdict.diverged or verdict.nonfinite_in_a_row >= self.max_nonfinite_steps
        return Decision(False, "abort" if ends else "go on", self._lost(verdict))

    def state(self) -> dict[str, Any]:
        """The counters, as plain JSON values."""
        return {"skips_in_a_row": self.skips_in_a_row, "rewinds": self.rewinds}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the counters from `state`."""
        self.skips_in_a_row, self.rewinds = state["skips_in_a_row"], state["rewinds"]

    def _lost(self, verdict: Verdict) -> str:
        """Why the whole run is in trouble, not just the step; empty when it is not."""
        if verdict.nonfinite_in_a_row >= self.max_nonfinite_steps:
            return f"loss or gradient was not finite {verdict.nonfinite_in_a_row} steps in a row"
        if verdict.diverged:
            return "the loss was at least twice its mean of the 100 steps before, 5 steps in a row"
        if self.name == "rewind" and verdict.width_before < self.rewind_after <= verdict.width:
            return f"a spike has not ended within {self.rewind_after} steps"
        return ""

    def _skip(self, verdict: Verdict) -> Decision:
        """Whether to skip: flagged by the loss, or by OLMo-core's rule on the gradient norm. Skips are limited, because
        a lasting shift is not a spike and a run that always skips learns nothing.
        """
        steep = verdict.gnorm_z > SHORT_SIGMA
        if not (verdict.flagged or steep):
            self.skips_in_a_row = 0
            return Decision(True)
        if self.skips_in_a_row >= self.max_skips:
            return Decision(True, reason=f"flagged, but {self.max_skips} steps in a row were already skipped")
        self.skips_in_a_row += 1
        return Decision(False, reason="loss spike" if verdict.flagged else "gradient norm beyond 6 sd of the last 128")
