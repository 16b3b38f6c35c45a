"""The learning rate of a step."""

from __future__ import annotations

import math

from kha_train.variants.optimizer import OptimSection


def learning_rate(optim: OptimSection, step: int, steps: int) -> float:
    """The rate of optimiser step `step` (1 .. `steps`): linear warm-up to `lr`, then the schedule to `final` x lr.

    `cosine` falls over all steps after the warm-up; `wsd` stays at `lr` and falls linearly over the last `decay` of the
    steps. During a surge, the rate is multiplied.
    """
    surge = optim.schedule.surge
    first = round(surge.start * steps)
    surges = first < step <= first + round(surge.length * steps)
    return _calm_rate(optim, step, steps) * (surge.factor if surges else 1.0)


def _calm_rate(optim: OptimSection, step: int, steps: int) -> float:
    """The rate without a surge."""
    schedule = optim.schedule
    floor = optim.lr * schedule.final
    warmup_steps = round(schedule.warmup * steps)
    if step <= warmup_steps:
        return optim.lr * step / warmup_steps
    if schedule.name == "cosine":
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = round(schedule.decay * steps)
    remaining = min(max(steps - step, 0), decay_steps)
    return floor + (optim.lr - floor) * (remaining / decay_steps if decay_steps else 1.0)
