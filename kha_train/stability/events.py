"""The event detector: finds spikes that stand out of the noise of their own curve, from their first step to their last.

The baseline is the last 128 values that belong to no event, at least 64. So a spike neither hides the next one nor
widens its own scale. A line through the medians of the older and the newer half follows the trend. m is the expected
next value: the value of this line or, if larger, the smaller of two medians, that of the newer half and that of the
last 8 values. s = max(1.4826 MAD, standard deviation, 0.001) of x - m over 128 judged values, of which the last 8 do
not count yet; at first, of the baseline's distances from its line.

An event opens at z = (x - m) / s >= 8 or at a non-finite value. The 8 deviations that did not count yet are then
discarded, because they may belong to the rise. m and s are frozen while the event is open. Three consecutive z < 2
close it and join the baseline. After 2,000 steps it is given up as unrecovered (a level shift), and the baseline starts
again from the last 128 values. A falling or slowly drifting loss opens no event. Neither does a loss that stops
falling: it leaves the line, but not the last 8 values.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .trend import SCALE_FLOOR, SIZE, Trend
from .window import usable

OPEN_Z, CLOSE_Z, CLOSE_COUNT = 8.0, 2.0, 3
MAX_STEPS = 2000
NARROW = 10
"""Events up to this width (in steps) are narrow. The boundary is this project's own choice."""
CLASSES = ("narrow", "wide", "unrecovered", "open")
"""The possible values of `SpikeEvent.kind`."""


class Observation(NamedTuple):
    """One optimiser step of a curve. `loss` is the token cross-entropy in nats, `grad_norm` the norm before clipping
    (nan: unknown), `tokens` the number read up to and including this step; samples are the batch's global sample
    numbers.
    """

    step: int
    loss: float
    grad_norm: float = math.nan
    tokens: int = 0
    lr: float = math.nan
    samples_first: int = -1
    samples_last: int = -1

    @property
    def finite(self) -> bool:
        """Whether the step could be applied: its loss is finite, and its norm is not known to be infinite or
        undefined.
        """
        return usable(self.loss) and (math.isnan(self.grad_norm) or usable(self.grad_norm))


@dataclass
class SpikeEvent:
    """One event. `baseline` and `scale` are m and s at its opening (nan: no value before it), `height` is max(x - m)
    and `area` the sum of (x - m)+ over its finite values. `gnorm_peak_ratio` is the largest norm divided by the mean of
    the 128 before it. `width` counts steps from the first to the last outside the noise.
    """

    start_step: int
    end_step: int
    tokens: int
    lr: float
    samples_first: int
    samples_last: int
    baseline: float
    scale: float
    gnorm_before: float
    height: float = 0.0
    area: float = 0.0
    gnorm_peak: float = math.nan
    nonfinite_steps: int = 0
    recovered: bool = False
    open: bool = True

    @property
    def width(self) -> int:
        """Steps from the first to the last, inclusive."""
        return self.end_step - self.start_step + 1

    @property
    def kind(self) -> str:
        """One of `CLASSES`: `open` at the end of the curve; `unrecovered` when it was given up or cut short; `narrow`
        or `wide`, by its width, when it recovered.
        """
        if self.open:
            return "open"
        if not self.recovered:
            return "unrecovered"
        return "narrow" if self.width <= NARROW else "wide"

    @property
    def gnorm_peak_ratio(self) -> float:
        """Largest gradient norm of the event / mean before it; nan when either is unknown."""
        return self.gnorm_peak / self.gnorm_before if self.gnorm_before > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `width`, `class`, `rel_height` (height / m), `gnorm_peak_ratio`."""
        derived = {
            "width": self.width,
            "class": self.kind,
            "rel_height": self.height / abs(self.baseline) if self.baseline else math.nan,
            "gnorm_peak_ratio": self.gnorm_peak_ratio,
        }
        return {**asdict(self), **derived}


class Reading(NamedTuple):
    """The detector's result for one step: `z` (nan: no baseline yet), whether the step itself stands out, whether it
    opened an event, and the event it closed.
    """

    z: float
    flagged: bool
    opened: bool
    closed: SpikeEvent | None


@dataclass
class EventDetector:
    """Pass every step to `update`; `event` is the open event. `state` and `restore` are all that a resume needs. Every
    run and command opens events at `OPEN_Z`; another `open_z` is for comparing thresholds and is not part of the state.
    """

    baseline: Trend = field(default_factory=Trend)
    event: SpikeEvent | None = None
    open_steps: int = 0
    _calm: list[float] = field(default_factory=list)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=SIZE))
    open_z: float = OPEN_Z

    def update(self, seen: Observation, gnorm_before: float = math.nan) -> Reading:
        """Add one step; `gnorm_before` is the usual gradient norm, kept when an event opens."""
        if self.event is not None:
            return self._inside(self.event, seen)
        if not seen.finite:
            self._open(seen, gnorm_before)
            return Reading(math.nan, True, True, None)
        if not self.baseline.ready:
            self.baseline.push(seen.loss)
            return Reading(math.nan, False, False, None)
        deviation = seen.loss - self.baseline.expected
        z = deviation / self.baseline.scale
        if z >= self.open_z:
            self._open(seen, gnorm_before)
            return Reading(z, True, True, None)
        self.baseline.push(seen.loss, deviation)
        return Reading(z, False, False, None)

    def rebase(self) -> SpikeEvent | None:
        """Forget the baseline: no finite value opens an event in the next 64 steps. Returns the event this closes, if
        one was open.
        """
        event, self.event = self.event, None
        self.baseline = Trend()
        if event is not None:
            event.open = False
        return event

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values."""
        return {
            "baseline": self.baseline.values,
            "deviations": self.baseline.deviations,
            "waiting": self.baseline.waiting,
            "event": None if self.event is None else asdict(self.event),
            "open_steps": self.open_steps,
            "calm": list(self._calm),
            "recent": list(self._recent),
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> EventDetector:
        """The detector with the given `state`. States from before the trend was followed have no `deviations`."""
        event = state["event"]
        return EventDetector(
            Trend(state["baseline"], state.get("deviations", ()), state.get("waiting", ())),
            None if event is None else SpikeEvent(**event),
            state["open_steps"],
            list(state["calm"]),
            deque(state["recent"], maxlen=SIZE),
        )

    def _open(self, seen: Observation, gnorm_before: float) -> None:
        known = len(self.baseline) > 0
        self.event = SpikeEvent(
            start_step=seen.step,
            end_step=seen.step,
            tokens=seen.tokens,
            lr=seen.lr,
            samples_first=seen.samples_first,
            samples_last=seen.samples_last,
            baseline=self.baseline.expected if known else math.nan,
            scale=self.baseline.scale if known else SCALE_FLOOR,
            gnorm_before=gnorm_before,
        )
        self.baseline.discard_waiting()
        self.open_steps, self._calm = 1, []
        self._recent.clear()
        self._add(self.event, seen)

    def _inside(self, event: SpikeEvent, seen: Observation) -> Reading:
        self.open_steps += 1
        # An event that began before any value was seen ends with the first three finite ones.
        z = 0.0 if math.isnan(event.baseline) else (seen.loss - event.baseline) / event.scale
        if seen.finite and z < CLOSE_Z:
            self._calm.append(seen.loss)
            self._recent.append(seen.loss)
            if len(self._calm) == CLOSE_COUNT:
                for loss in self._calm:
                    self.baseline.push(loss)
                return Reading(z, False, False, self._close(recovered=True))
        else:
            self._add(event, seen)
        closed = None
        if self.open_steps >= MAX_STEPS:
            event.end_step = seen.step
            self.baseline = Trend(self._recent)
            closed = self._close(recovered=False)
        return Reading(z if seen.finite else math.nan, not seen.finite or z >= self.open_z, False, closed)

    def _add(self, event: SpikeEvent, seen: Observation) -> None:
        """Add the step to the event, with the calm steps before it that turned out to lie inside."""
        event.end_step, event.samples_last = seen.step, seen.samples_last
        if usable(seen.loss):
            self._recent.append(seen.loss)
        # Without a baseline nothing can stand above it.
        for loss in [*self._calm, seen.loss] if not math.isnan(event.baseline) else []:
            if usable(loss):
                event.height = max(event.height, loss - event.baseline)
                event.area += max(loss - event.baseline, 0.0)
        self._calm = []
        event.nonfinite_steps += not seen.finite
        if not math.isnan(seen.grad_norm):
            event.gnorm_peak = seen.grad_norm if math.isnan(event.gnorm_peak) else max(event.gnorm_peak, seen.grad_norm)

    def _close(self, recovered: bool) -> SpikeEvent:
        event, self.event = self.event, None
        assert event is not None
        event.recovered, event.open = recovered, False
        self._calm = []
        return event
