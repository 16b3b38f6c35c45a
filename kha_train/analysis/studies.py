"""A study: one question, its arms, rates, seeds and measures, as `configs/study/NAME.yaml` holds it.

An arm is a list of overrides. Every arm is trained at each of its learning rates, and arms are compared at their best
rate, because one rate for all arms favours the arm that it suits. A study has up to three scales: `cpu` takes minutes
on two cores, `paper` has the shapes and budgets that were printed, and `h200_15min` takes 15 minutes of one GPU.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kha_train.analysis.study_heads import FIGURES
from kha_train.config.build import build, nearest
from kha_train.config.compose import STUDIES, shipped
from kha_train.errors import ConfigError
from kha_train.foreign.documents import parse_yaml
from kha_train.foreign.files import SMALL, read_regular

ScaleName = Literal["cpu", "paper", "h200_15min"]
MeasureKind = Literal[
    "train_loss",
    "validation_loss",
    "bits_per_byte",
    "late_loss",
    "loss_at",
    "steps_to",
    "spikes",
    "events",
    "area",
    "loss_law",
    "step_seconds",
    "entry",
    "heads",
]
Dataset = Literal["text", "copy", "tasks", "own"]
"""`text`: the standard library's sources with 4,096 tokens, as in the quickstart. `copy`: one synthetic task. `tasks`:
a mixture of several (docs/tasks.md). `own`: the user's shards, named by `data.train` and `data.validation`."""
NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
RUNS = "runs"
"""The usual kind of trials: training runs."""


@dataclass(frozen=True, kw_only=True)
class CompressedArm:
    """What an arm's runs begin with: the model of the run of `arm` with the same seed, whose `layers` are compressed to
    `kv_heads` as by `kha compress`.
    """

    arm: str
    layers: str
    kv_heads: int


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is compared: a name and the overrides that make it. `reference` is the arm that it is compared with ("": the
    study's reference). With `compresses`, overrides are added to those of the arm that it begins with. `stands_for` is
    the arm of another scale whose published figures it is held against, where that has another name.
    """

    name: str
    overrides: tuple[str, ...]
    reference: str = ""
    compresses: CompressedArm | None = None
    stands_for: str = ""


@dataclass(frozen=True, kw_only=True)
class ArmRates:
    """The learning rates of one arm, where they differ from those of the others."""

    arm: str
    rates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure of one run.

    `train_loss`, `validation_loss` and `bits_per_byte` are the last ones, as `kha compare` has them. `steps_to` counts
    the steps until the mean train loss of five steps is at most `threshold` nats. `late_loss` is the mean train loss of
    the last half of the steps: its paired difference is the tail gap. `loss_at` is the mean train loss of the steps up
    to `tokens` tokens, beginning a tenth of them before. `spikes` counts narrow and wide loss spikes, `events`
    those that did not recover too; `area` is the sum of the losses above the baseline during events, in nats x steps,
    and infinite if a step was not finite.
    `step_seconds` is the median time of a step.

    `loss_law` is the loss that a fitted law gives after `tokens` tokens. `entry` is the last value of the
    record's entry `entry`, such as that of an evaluation task; where trials are computations, their figure `entry`.
    `heads` is the figure `entry` of `FIGURES` that `kha analyze` finds in the last checkpoint.
    """

    kind: MeasureKind
    threshold: float = 0.0
    tokens: float = 0.0
    entry: str = ""
    larger_is_better: bool = False

    @property
    def name(self) -> str:
        """The name in results: `train_loss`, `steps_to_1.5`, `evaluation/answers/loss`."""
        further = {
            "steps_to": f"_{self.threshold:g}",
            "loss_law": f"_at_{self.tokens:g}_tokens",
            "loss_at": f"_{self.tokens:g}_tokens",
            "heads": f"_{self.entry}",
        }
        return self.entry if self.kind == "entry" else f"{self.kind}{further.get(self.kind, '')}"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper prints of an `arm`: `what` it is and its `value`, or in what it is `better_than` another arm."""

    what: str
    arm: str
    value: float | None = None
    better_than: str = ""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Two arms whose differences from their references are compared: does `arm` gain more over its own than `other`?"""

    arm: str
    other: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a study is. `overrides` are common to all arms; `steps` is the budget of the first arm, and `equal`
    says what the others have in common with it.

    Every arm is trained at `rates` (or its own in `arm_rates`). With `rate_seeds`, the best rate is chosen on these
    seeds alone, in runs of `rate_steps` steps (0: `steps`), and arms are compared on `seeds`. Without them, it is
    chosen on the compared runs themselves, and the result says so. `arms` and `measures` replace those of the study.
    `needs` says in words what a run at this scale needs beside a machine.
    """

    dataset: Dataset = "own"
    overrides: tuple[str, ...] = ()
    steps: int
    equal: Literal["steps", "tokens", "flops"] = "steps"
    rates: tuple[float, ...]
    arm_rates: tuple[ArmRates, ...] = ()
    seeds: tuple[int, ...]
    rate_seeds: tuple[int, ...] = ()
    rate_steps: int = 0
    arms: tuple[Arm, ...] = ()
    measures: tuple[Measure, ...] = ()
    needs: str = ""

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """The learning rates at which `arm` is trained, ascending."""
        own = {each.arm: each.rates for each in self.arm_rates}
        return tuple(sorted(own.get(arm, self.rates)))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question and how it is answered. The result's sentence is about the first of the measures, which also chooses
    the rates, unless `rate_measure` names another of them. Arms without a reference, their own or the study's, are
    trained but compared with nothing. `gains` answer whether a difference depends on something: of two differences one
    may be shown and the other not though they are equal, so they are compared with each other, seed by seed.
    `not_shown` says what no result of the study can show. Figures were published at the size `published_at`, and are
    losses, unless higher ones are better. `yardstick` is the study of arms that do not differ at the same size. With
    `difference_law`, a law is fitted to the differences in the measures `loss_at`.

    A trial is a training run, or a computation that `trials` names (`operate.computed.COMPUTATIONS`). Overrides are
    then the settings of the computation, rates its `rate`, and all measures are of the kind `entry`.
    """

    question: str
    source: str
    notes: tuple[str, ...] = ()
    not_shown: str = ""
    trials: str = RUNS
    reference: str = ""
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    gains: tuple[Gains, ...] = ()
    rate_measure: str = ""
    published: tuple[Published, ...] = ()
    published_at: str = ""
    published_higher_is_better: bool = False
    yardstick: str = ""
    difference_law: bool = False
    cpu: Scale
    paper: Scale | None = None
    h200_15min: Scale | None = None

    @property
    def scales(self) -> Mapping[ScaleName, Scale]:
        """The scales that it has."""
        named: dict[ScaleName, Scale | None] = {"cpu": self.cpu, "paper": self.paper, "h200_15min": self.h200_15min}
        return {name: scale for name, scale in named.items() if scale is not None}


@dataclass(frozen=True)
class Trial:
    """A run or computation of a study. `role` is `rate` if it only serves to choose the arm's rate, else `compared`."""

    arm: str
    rate: float
    seed: int
    role: Literal["rate", "compared"] = "compared"


@dataclass(frozen=True)
class ScaledStudy:
    """A study at one of its scales: `name`, the SHA-256 of its file, and what the scale chooses."""

    name: str
    sha256: str
    study: Study
    scale_name: ScaleName

    @property
    def scale(self) -> Scale:
        """The chosen scale."""
        return self.study.scales[self.scale_name]

    @property
    def computes(self) -> bool:
        """Whether trials are computations instead of training runs."""
        return self.study.trials != RUNS

    @property
    def arms(self) -> Mapping[str, Arm]:
        """The arms by name, each with the reference it is compared with ("": none, as for the reference itself)."""
        chosen = self.scale.arms or self.study.arms
        named = {arm.name: arm.reference or self.study.reference for arm in chosen}
        return {
            arm.name: replace(arm, reference=named[arm.name] if named[arm.name] != arm.name else "") for arm in chosen
        }

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is measured; the sentence is about the first."""
        return self.scale.measures or self.study.measures

    @property
    def gains(self) -> list[Gains]:
        """The differences that are compared with each other, of arms that this scale has."""
        return [one for one in self.study.gains if {one.arm, one.other} <= self.arms.keys()]

    @property
    def rate_measure(self) -> Measure:
        """The measure that chooses the rates."""
        named = {measure.name: measure for measure in self.measures}
        return named.get(self.study.rate_measure, self.measures[0])

    @property
    def chooses_apart(self) -> bool:
        """Whether rates are chosen on runs that are not compared."""
        return bool(self.scale.rate_seeds)

    def rate_trials(self) -> list[Trial]:
        """The runs that serve only to choose rates. An arm with one rate needs none."""
        arms = [arm for arm in self.arms if len(self.scale.rates_of(arm)) > 1]
        return [
            Trial(arm, rate, seed, "rate")
            for arm in arms
            for rate in self.scale.rates_of(arm)
            for seed in self.scale.rate_seeds
        ]

    def compared_trials(self, rates: Mapping[str, float] | None = None) -> list[Trial]:
        """The runs of every arm at the rate in `rates`; without it, or where rates are chosen among the compared runs,
        at each of its rates.
        """
        chosen = rates if self.chooses_apart else None
        return [
            Trial(arm, rate, seed)
            for arm in self.arms
            for rate in (self.scale.rates_of(arm) if chosen is None else (chosen[arm],))
            for seed in self.scale.seeds
        ]


def study_names() -> list[str]:
    """The names of the studies that are shipped."""
    return sorted(path.stem for path in (shipped("configs") / STUDIES).glob("*.yaml"))


def load_study(name: str, scale: str) -> ScaledStudy:
    """The study `name` of `configs/study`, or the one in the file `name`, which ends with .yaml, at `scale`.

    Raises ConfigError for an unknown name or scale, and for a file that is not a study.
    """
    names = study_names()
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped("configs") / STUDIES / f"{name}.yaml"
    raw = read_regular(path, SMALL) if name in names or path == Path(name) else None
    if raw is None:
        raise ConfigError("no such study", field="study", value=name, **nearest(name, names))
    try:
        values = parse_yaml(raw)
    except ValueError as error:
        raise ConfigError(f"cannot be read: {error}", field=str(path)) from error
    study = build(Study, values)
    chosen = next((one for one in study.scales if one == scale), None)
    if chosen is None:
        raise ConfigError("no such scale", field="--scale", value=scale, allowed=", ".join(study.scales))
    found = ScaledStudy(path.stem, hashlib.sha256(raw).hexdigest(), study, chosen)
    problem = next(_problems(found), None)
    if problem:
        raise ConfigError(problem, field=str(path))
    return found


def _problems(found: ScaledStudy) -> Iterator[str]:
    """What is wrong with a study, in words."""
    scale, chosen = found.scale, found.scale.arms or found.study.arms
    names = [arm.name for arm in chosen]
    yield from (f"{name!r} is not a name: {NAME.pattern}" for name in names if not NAME.fullmatch(name))
    if len(set(names)) < len(names):
        yield "two arms have one name"
    named = (*(arm.reference for arm in found.arms.values()), *(one.arm for one in scale.arm_rates))
    yield from (f"there is no arm {name!r}" for name in named if name and name not in names)
    yield from _compressing(found, names)
    if not scale.seeds or not found.measures:
        yield "there must be at least one seed and one measure"
    if len(set(scale.seeds)) < len(scale.seeds) or {*scale.seeds} & {*scale.rate_seeds}:
        yield "each seed may be given once, in `seeds` or in `rate_seeds`"
    if scale.rate_steps and not scale.rate_seeds:
        yield "`rate_steps` needs `rate_seeds`"
    grids = (scale.rates, *(one.rates for one in scale.arm_rates))
    if not all(grids) or min(rate for rates in grids for rate in rates) <= 0:
        yield "every arm needs at least one rate, and each rate must be above 0"
    yield from ("an `entry` needs its name" for one in found.measures if one.kind == "entry" and not one.entry)
    yield from (
        f"a `{one.kind}` needs `tokens`"
        for one in found.measures
        if one.kind in ("loss_law", "loss_at") and one.tokens <= 0
    )
    yield from (
        f"{one.entry!r} is no figure of heads: {', '.join(FIGURES)}"
        for one in found.measures
        if one.kind == "heads" and one.entry not in FIGURES
    )
    every = {arm.name: arm.reference or found.study.reference for arm in (*found.study.arms, *chosen)}
    yield from (
        f"{name!r} of `gains` must be an arm with a reference"
        for pair in found.study.gains
        for name in (pair.arm, pair.other)
        if every.get(name) in (None, "", name)
    )
    if found.study.rate_measure not in ("", *(measure.name for measure in found.measures)):
        yield f"there is no measure {found.study.rate_measure!r}"
    if any((one.value is None) == (not one.better_than) for one in found.study.published):
        yield "what is published has a `value`, or an arm that it is `better_than`"
    if found.computes:
        yield from (f"{found.study.trials} has no {one.name}" for one in found.measures if one.kind != "entry")
        if (scale.dataset, scale.equal, scale.rate_steps) != ("own", "steps", 0):
            yield f"`dataset`, `equal` and `rate_steps` mean nothing to {found.study.trials}"


def _compressing(found: ScaledStudy, names: Sequence[str]) -> Iterator[str]:
    """What is wrong with the arms that begin with the model of another."""
    for name, arm in found.arms.items():
        begins = arm.compresses
        if begins is None:
            continue
        if begins.arm not in names:
            yield f"{name} begins with {begins.arm!r}, and there is no such arm"
        elif found.arms[begins.arm].compresses or len(found.scale.rates_of(begins.arm)) > 1 or found.chooses_apart:
            yield f"{name} begins with {begins.arm}, which must be trained from scratch, at one rate"
