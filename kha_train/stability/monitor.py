"""All measurements of a curve, step by step. A `Monitor` works online and on a finished curve alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .divergence import DivergenceGuard
from .events import EventDetector, Observation, SpikeEvent
from .scores import SHORT_SIGMA, SignalScores

METRICS = (
    ("spike/z", "1", "(loss - m) / s; m: what the trend of the last 128 losses outside events expects"),
    ("spike/open", "0/1", "1 while an event is open after the step"),
    ("spike/events_total", "count", "events so far, the open one included"),
    ("spike/narrow_total", "count", "closed events of at most 10 steps"),
    ("spike/wide_total", "count", "closed events of more than 10 steps"),
    ("spike/unrecovered_total", "count", "events given up after 2,000 steps, or cut short by a planned change"),
    (
        "spike/olmo_loss_score",
        "%",
        "steps whose loss is 7 sd or more from the mean of the previous 1,000, of those judged (OLMo 2)",
    ),
    ("spike/olmo_loss_score_w10k", "%", "spike/olmo_loss_score over the last 10,000 judged steps"),
    ("spike/olmo_loss_up_score", "%", "as spike/olmo_loss_score, upward only"),
    ("spike/olmo_gnorm_score", "%", "as spike/olmo_loss_score, of train/grad_norm"),
    ("spike/olmo_gnorm_score_w10k", "%", "spike/olmo_gnorm_score over the last 10,000 judged steps"),
    ("spike/z128_loss", "1", "(loss - mean) / sd of the previous 128"),
    ("spike/z128_gnorm", "1", "(train/grad_norm - mean) / sd of the previous 128"),
    ("spike/z128_flag", "0/1", "1 when either of the two is above 6 (OLMo-core's rule)"),
    ("train/nonfinite_steps", "steps", "steps with a non-finite loss or norm since step 0"),
)
"""The metrics of a `Verdict`: name, unit and meaning of each."""
DETECTOR = 1
"""Version of the detectors. Raise it with any change that alters the events or scores of a curve."""


class Verdict(NamedTuple):
    """The assessment of a step, before anything is done about it.

    `judged`: the detector could say whether it is normal; `flagged`: the step itself stands out (robust z of the loss,
    or not finite); `gnorm_z`: z of its gradient norm over the last 128; `opened`: an event begins here; `closed`: the
    event that ended here; `width_before`, `width`: width of the open event before and after this step (0: none);
    `diverged`: the loss guard fires here; `metrics`: the `spike/*` values of the metrics line, without those that are
    not defined yet.
    """

    finite: bool
    judged: bool
    flagged: bool
    gnorm_z: float
    opened: bool
    closed: SpikeEvent | None
    width_before: int
    width: int
    diverged: bool
    nonfinite_in_a_row: int
    metrics: dict[str, float]


@dataclass
class Monitor:
    """Detectors and scores of one curve. Call `update` once per step, in order; `state` and `restore` are all that a
    resume needs.
    """

    events: EventDetector = field(default_factory=EventDetector)
    loss: SignalScores = field(default_factory=SignalScores)
    grad_norm: SignalScores = field(default_factory=SignalScores)
    guard: DivergenceGuard = field(default_factory=DivergenceGuard)
    closed: dict[str, int] = field(default_factory=lambda: {"narrow": 0, "wide": 0, "unrecovered": 0})
    nonfinite_steps: int = 0

    def update(self, seen: Observation, planned_change: bool = False, with_metrics: bool = True) -> Verdict:
        """Add one step of the curve. `metrics` of the verdict are empty unless `with_metrics`.

        `planned_change` marks an intended change at this step (the data mixture, the schedule). The baseline before it
        is forgotten, so that the jump is neither an event nor a divergence, and an open event ends unrecovered.
        """
        width_before = self.events.event.width if self.events.event else 0
        cut_short = self.events.rebase() if planned_change else None
        if planned_change:
            self.guard.rebase()
        reading = self.events.update(seen, self.grad_norm.short.mean)
        closed = cut_short or reading.closed
        if closed is not None:
            self.closed[closed.kind] += 1
        loss_z = self.loss.update(seen.loss)
        # A curve may come without norms, so an unknown norm is ignored.
        gnorm_z = math.nan if math.isnan(seen.grad_norm) else self.grad_norm.update(seen.grad_norm)
        finite = seen.finite
        self.nonfinite_steps += not finite
        diverged = self.guard.update(seen.loss, finite)
        return Verdict(
            finite=finite,
            judged=not math.isnan(reading.z),
            flagged=reading.flagged,
            gnorm_z=gnorm_z,
            opened=reading.opened,
            closed=closed,
            width_before=width_before,
            width=self.events.event.width if self.events.event else 0,
            diverged=diverged,
            nonfinite_in_a_row=self.guard.nonfinite_in_a_row,
            metrics=self._metrics(reading.z, loss_z, gnorm_z) if with_metrics else {},
        )

    def _metrics(self, z: float, loss_z: float, gnorm_z: float) -> dict[str, float]:
        is_open = self.events.event is not None
        metrics = {
            "spike/z": z,
            "spike/open": int(is_open),
            "spike/events_total": sum(self.closed.values()) + is_open,
            "spike/narrow_total": self.closed["narrow"],
            "spike/wide_total": self.closed["wide"],
            "spike/unrecovered_total": self.closed["unrecovered"],
            "spike/olmo_loss_score": self.loss.both_sides.percent,
            "spike/olmo_loss_score_w10k": self.loss.both_sides.recent_percent,
            "spike/olmo_loss_up_score": self.loss.upward.percent,
            "spike/olmo_gnorm_score": self.grad_norm.both_sides.percent,
            "spike/olmo_gnorm_score_w10k": self.grad_norm.both_sides.recent_percent,
            "spike/z128_loss": loss_z,
            "spike/z128_gnorm": gnorm_z,
            "spike/z128_flag": int(loss_z > SHORT_SIGMA or gnorm_z > SHORT_SIGMA),
            "train/nonfinite_steps": self.nonfinite_steps,
        }
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values, as a checkpoint keeps it."""
        return {
            "events": self.events.state(),
            "loss": self.loss.state(),
            "grad_norm": self.grad_norm.state(),
            "guard": self.guard.state(),
            "closed": dict(self.closed),
            "nonfinite_steps": self.nonfinite_steps,
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> Monitor:
        """The monitor with the given `state`; it continues exactly as the original would."""
        return Monitor(
            EventDetector.restore(state["events"]),
            SignalScores.restore(state["loss"]),
            SignalScores.restore(state["grad_norm"]),
            DivergenceGuard.restore(state["guard"]),
            dict(state["closed"]),
            state["nonfinite_steps"],
        )
