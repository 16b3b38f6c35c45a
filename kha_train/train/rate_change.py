"""How another schedule changes the learning rate of a resumed run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kha_train.config.build import build
from kha_train.config.compose import load_plain, quoted
from kha_train.config.saved import completed
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, KhaError, ResumeError, Settings, either
from kha_train.literal import say
from kha_train.optim import learning_rate
from kha_train.record.attempts import CONFIG_FILE
from kha_train.variants.optimizer import OptimSection

LARGEST_JUMP = 1.5
"""The factor, up or down, by which the rate of a resumed run may change between two steps without being allowed
explicitly.
"""
SAME = 1e-5
"""Rates that differ by less, relative to the larger, count as equal: an override has six digits."""
ACCEPTED_BY = ("optim", "optim.lr", "optim.schedule")
"""The values of `resume.allow_changes` that allow a jump of the rate."""
JUMPS = "{} allows the jump of the rate (docs/resume.md, 'Train longer')"


@dataclass(frozen=True)
class RateChange:
    """The learning rate `now` of `step`, the first after a resume, where the checkpoint's schedule `planned` another;
    the previous step had the rate `before`.
    """

    step: int
    before: float
    planned: float
    now: float

    @property
    def nearest(self) -> float:
        """The rate to compare with: a rate that stays constant or follows the plan is not a jump."""
        return min(self.before, self.planned, key=lambda rate: _factor(rate, self.now))

    @property
    def is_jump(self) -> bool:
        """Whether the rate changes by more than `LARGEST_JUMP`."""
        return _factor(self.nearest, self.now) > LARGEST_JUMP

    def __str__(self) -> str:
        return (
            f"the learning rate of step {self.step}: {self.now:.3g} now, "
            f"{self.planned:.3g} by the checkpoint's schedule; step {self.step - 1} had {self.before:.3g}"
        )


def rate_change(config: RunConfig, saved: Mapping[str, Any], step: int) -> RateChange | None:
    """How the rate changes when a run of the `saved` configuration continues after `step` under `config`.

    None if it does not change, no step is left, or this release does not know the saved schedule.
    """
    following = step + 1
    if following > config.run.steps:
        return None
    values = completed(saved)
    try:
        optim, steps = build(OptimSection, values.get("optim"), "optim"), int(values["run"]["steps"])
        before, planned = (learning_rate(optim, min(number, steps), steps) for number in (step, following))
    except (ConfigError, KeyError, TypeError, ArithmeticError):
        return None
    now = learning_rate(config.optim, following, config.run.steps)
    return None if math.isclose(planned, now, rel_tol=SAME) else RateChange(following, before, planned, now)


def check_rate(config: RunConfig, change: RateChange | None) -> None:
    """Raises ResumeError for a jump of the rate that `resume.allow_changes` does not allow."""
    names = config.resume.allow_changes
    if change and change.is_jump and not any(name in ACCEPTED_BY for name in names):
        raise ResumeError(
            f"{change}; unless allowed, a resumed run changes it at most by a factor of {LARGEST_JUMP}",
            field="run.dir",
            value=config.run.dir,
            fix=either(*ways(config, change, names)),
        )


def tell_rate_change(change: RateChange | None, is_main: bool) -> dict[str, float]:
    """The fields of the event `learning_rate_changed`, empty if the rate does not change; rank 0 prints it now."""
    if change is None:
        return {}
    if is_main:
        say(f"note: {change}")
    return {"before": change.before, "planned": change.planned, "now": change.now}


def ways(config: RunConfig, change: RateChange | None, names: Sequence[str]) -> tuple[Settings, ...]:
    """What to type so that the settings `names` may change in this run: one way, or two where the rate would jump and
    `names` do not allow that.
    """
    if change is None or not change.is_jump:
        return (Settings(_allowing(config, *names)),)
    if any(name in ACCEPTED_BY for name in names):
        return (Settings(_allowing(config, *names), JUMPS),)
    jump = Settings(_allowing(config, *names, "optim.schedule"), JUMPS)
    if not change.nearest:
        return (jump,)
    keeping = f"{_keeping(config, change)} {_allowing(config, *names, 'optim')}"
    return Settings(keeping, "{} keeps the rate, and lets it decay again"), jump


def train_longer(config: RunConfig, finished: int) -> Settings:
    """What to add to the command of the run of `config`, finished after `finished` steps, to train twice as many. Uses
    only what can be read before the checkpoint is opened; the start reports anything else.
    """
    try:
        saved = load_plain(Path(config.run.dir) / CONFIG_FILE)
    except KhaError:
        saved = {}
    longer = replace(config, run=replace(config.run, steps=2 * finished))
    way = ways(longer, rate_change(longer, saved, finished), ["run.steps"])[0]
    return Settings(f"run.steps={longer.run.steps} {way.typed}", way.shown)


def _factor(one: float, other: float) -> float:
    small, large = sorted((one, other))
    return large / small if small else 1.0 if large == small else math.inf


def _keeping(config: RunConfig, change: RateChange) -> str:
    """Overrides that keep the rate and let it decay over at most the second half of the remaining steps."""
    left = config.run.steps - change.step + 1
    decay = min(config.optim.schedule.decay, left / 2 / config.run.steps)
    settings = {
        "optim.lr": f"{change.nearest:.6g}",
        "optim.schedule.name": "wsd",
        "optim.schedule.warmup": "0",
        "optim.schedule.decay": f"{math.floor(decay * 1e6) / 1e6:g}",
    }
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _allowing(config: RunConfig, *names: str) -> str:
    """This run's directory, since other settings would give another one, and `resume.allow_changes` with its current
    names and `names`, without those that lie in a section of it.
    """
    every = dict.fromkeys((*config.resume.allow_changes, *names))
    kept = [name for name in every if not any(name.startswith(f"{other}.") for other in every)]
    place = shlex.quote(f"run.dir={quoted(config.run.dir)}")
    return f"{place} resume.allow_changes=[{','.join(kept)}]"
