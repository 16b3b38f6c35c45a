"""Monitors the stability of a run during training: every step is judged before the optimiser sees it.

After the step's one agreement all ranks have the same loss and the same norm, and the same state here. So each decides
on its own and all decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kha_train.config.schema import RunConfig
from kha_train.errors import DivergedError
from kha_train.metric import Metric
from kha_train.stability.events import Observation, SpikeEvent
from kha_train.stability.monitor import Monitor, Verdict
from kha_train.stability.policy import Decision, Policy
from kha_train.stability.zclip import ZClip

METRICS = (Metric("train/zclip_limit", "1", "norm that ZClip let the gradient have: its own unless it stood out"),)
ANNOUNCED = ("spike_opened", "divergence", "rewind", "rewind_impossible")
"""Kinds of events that the console prints at once."""


class Ruling(NamedTuple):
    """What to do with a step: apply the update, scaled to at most `max_norm`, or discard it; and whether to probe it
    first.
    """

    apply: bool
    max_norm: float = math.inf
    probe: bool = False


@dataclass(frozen=True)
class Trouble:
    """The first data that a rewind skips, and the reason."""

    step: int
    sample: int
    reason: str


def crosses(phases: Sequence[int], before: int, now: int) -> bool:
    """Whether one of the sample numbers `phases`, where the data mixture changes, lies in (`before`, `now`]."""
    return any(before < start <= now for start in phases)


class Watch:
    """Detectors, policy and clipping of one run. Call `judge` once per step; then read `verdict` and `decision`."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._grad_clip = config.stability, config.optim.grad_clip
        self._phases = [phase.start_sample for phase in config.data.phases]
        self._monitor, self._zclip = Monitor(), ZClip()
        self._policy = Policy(
            config.stability.policy,
            max_nonfinite_steps=config.stability.max_nonfinite_steps,
            max_skips=config.stability.max_skips,
            rewind_after=config.stability.rewind.after,
            max_rewinds=config.stability.rewind.at_most,
        )
        self.seen = Observation(0, math.nan)
        self.verdict: Verdict | None = None
        self.decision = Decision(True)
        self._limit: float | None = None
        self._expects_change = False

    def expect_change(self) -> None:
        """The next step is trained otherwise than those before it (other data, longer rows): what was a normal loss
        until now says nothing of it."""
        self._expects_change = True

    def judge(self, seen: Observation) -> Ruling:
        """The ruling about a step, from values that every rank knows."""
        planned = self._expects_change or crosses(self._phases, self.seen.samples_first, seen.samples_first)
        self._expects_change = False
        self.seen, self.verdict = seen, self._monitor.update(seen, planned_change=planned)
        self.decision = self._policy.decide(self.verdict)
        judged = self._config.zclip and self.decision.apply
        self._limit = self._zclip.limit(seen.grad_norm) if judged else None
        max_norm = math.inf if self._limit is None or self._limit >= seen.grad_norm else self._limit
        return Ruling(self.decision.apply, max_norm, self._wants_probe(seen.step))

    @property
    def clipped(self) -> bool:
        """Whether the gradient of the last step was scaled down, by `optim.grad_clip` or by ZClip."""
        norm = self.seen.grad_norm
        limit = self._grad_clip if self._limit is None else min(self._grad_clip, self._limit)
        return self.decision.apply and norm > limit

    def metrics(self) -> dict[str, float]:
        """The `spike/*` entries of the step's metrics line, and the norm allowed by ZClip when it is on."""
        limit = {} if self._limit is None else {"train/zclip_limit": self._limit}
        return {**(self.verdict.metrics if self.verdict else {}), **limit}

    def happenings(self, evidence: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind, fields) of the events of the last step, for `events.jsonl`. `evidence` is the result of `probe`."""
        seen, verdict = self.seen, self.verdict
        assert verdict is not None
        samples = {"samples_first": seen.samples_first, "samples_last": seen.samples_last}
        if not self.decision.apply:
            why = {"loss": seen.loss, "norm": seen.grad_norm, "reason": self.decision.reason}
            yield "step_discarded", {**why, **samples}
        if self._limit is not None and self._limit < min(seen.grad_norm, self._grad_clip):
            yield "zclip", {"norm": seen.grad_norm, "limit": self._limit, **samples}
        if verdict.opened:
            event = self.event
            assert event is not None
            z = verdict.metrics.get("spike/z", math.inf)
            numbers = {"loss": seen.loss, "norm": seen.grad_norm, "z": z, "baseline": event.baseline}
            yield "spike_opened", {**numbers, **samples, "evidence": evidence or {}}
        if verdict.closed is not None:
            yield "spike_closed", verdict.closed.to_dict()
        if verdict.diverged:
            yield "divergence", {"loss": seen.loss, "norm": seen.grad_norm, **samples}

    def go_on(self) -> None:
        """There is no checkpoint to go back to: decide again, without rewinding."""
        assert self.verdict is not None
        self.decision = self._policy.without_rewind(self.verdict)

    def check(self) -> None:
        """Raises DivergedError when the last decision was to end the run."""
        if self.decision.then == "abort":
            raise DivergedError(
                f"{self.decision.reason}, last at step {self.seen.step}",
                field="stability.policy",
                value=self._config.policy,
                fix="lower optim.lr or lengthen optim.schedule.warmup; earlier checkpoints are kept",
                code="E14",
            )

    def check_end(self, steps: int, skipped: int) -> None:
        """Raises DivergedError when a run of `steps` steps, `skipped` of which were not applied, must not count as
        trained: its last step was not finite, or no step was applied at all.
        """
        in_a_row = self._monitor.guard.nonfinite_in_a_row
        if in_a_row:
            problem = f"the run ends with {in_a_row} non-finite steps in a row, the last one at step {steps}"
        elif steps and skipped == steps:
            problem = f"none of the {steps} steps could be applied"
        else:
            return
        raise DivergedError(
            problem,
            field="run.steps",
            value=steps,
            fix="lower optim.lr or model.init_std, or lengthen optim.schedule.warmup; earlier checkpoints are kept",
            code="E14",
        )

    @property
    def event(self) -> SpikeEvent | None:
        """The event that is open after the last step."""
        return self._monitor.events.event

    @property
    def monitor(self) -> tuple[Monitor, Verdict] | None:
        """The monitor and its last verdict, for reading; None before the first step of this start."""
        return None if self.verdict is None else (self._monitor, self.verdict)

    @property
    def rewinds(self) -> int:
        """How often the run has gone back so far."""
        return self._policy.rewinds

    def trouble(self) -> Trouble:
        """The reason for the last decision to rewind: the open event, or the last step when none is open."""
        event = self.event
        if event is None:
            return Trouble(self.seen.step, self.seen.samples_first, self.decision.reason)
        return Trouble(event.start_step, event.samples_first, self.decision.reason)

    def state(self) -> dict[str, Any]:
        """The whole state, as plain JSON values, as a checkpoint keeps it."""
        return {
            "monitor": self._monitor.state(),
            "policy": self._policy.state(),
            "zclip": self._zclip.state(),
            "samples_first": self.seen.samples_first,
        }

    def restore(self, state: dict[str, Any], rewound: bool = False) -> None:
        """Restore the `state` of a checkpoint. After a rewind the number of rewinds is not reset."""
        rewinds = self._policy.rewinds + 1
        self._monitor, self._zclip = Monitor.restore(state["monitor"]), ZClip.restore(state["zclip"])
        self._policy.restore(state["policy"])
        self.seen = Observation(0, math.nan, samples_first=state["samples_first"])
        if rewound:
            self._policy.rewinds = rewinds

    def _wants_probe(self, step: int) -> bool:
        assert self.verdict is not None
        every = self._config.probe_every
        return self.verdict.opened or (every > 0 and step % every == 0)


def describe(kind: str, step: int, fields: dict[str, Any]) -> str:
    """An announced event in one line."""
    match kind:
        case "spike_opened":
            known = math.isfinite(fields["baseline"])
            before = f"{fields['baseline']:.3f} before" if known else "nothing known before"
            return f"loss spike at step {step}: {fields['loss']:.3f} against {before}"
        case "divergence":
            return f"step {step}: the loss, {fields['loss']:.3f}, has been twice its mean for five steps"
        case "rewind":
            first, last = fields["window"]
            return f"back from step {step} to step {fields['to_step']}, without samples {first}..{last - 1}"
        case _:
            return f"step {step}: {fields['reason']}, but no checkpoint before it is left"
