"""The result of a study: the rate at which each arm is best, arms against their references, and what may be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kha_train.analysis.statistics import SeedInterval, over_seeds
from kha_train.analysis.studies import Gains, Measure, Published, ScaledStudy, Trial
from kha_train.analysis.study_outcomes import Outcome, TrialSize
from kha_train.analysis.study_pairs import NO_INTERVAL, SIGNIFICANT, Compared, counted, paired

FORMAT = 1


@dataclass(frozen=True)
class Chosen:
    """The best rate of an arm. `at_edge`: it is the lowest or highest of several, so a better one may lie outside."""

    rate: float
    at_edge: bool


@dataclass(frozen=True)
class ArmResult:
    """An arm at its best rate: values of every measure by seed, the runs, and how many diverged. `by_rate` has the
    values of the measure that chooses rates, for every rate and seed on which rates were compared. `counts` names the
    measures without an interval. `size` is that of its first run.
    """

    name: str
    overrides: tuple[str, ...]
    reference: str
    chosen: Chosen | None
    by_rate: Mapping[float, Mapping[int, float | None]]
    values: Mapping[str, Mapping[int, float | None]]
    runs: Mapping[int, str]
    diverged: int
    diverged_by_rate: Mapping[float, int]
    counts: tuple[str, ...] = ()
    size: TrialSize | None = None
    stands_for: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether any rate gave a finite value of the measure that chooses rates."""
        tried = [value for values in self.by_rate.values() for value in values.values()]
        return any(value is not None and math.isfinite(value) for value in tried)

    def mean(self, measure: str) -> float | None:
        """The mean over seeds; None where a seed has no value."""
        values = list(self.values[measure].values())
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known and len(known) == len(values) else None

    def interval(self, measure: str) -> SeedInterval | None:
        """The mean with its 95 % Student interval over seeds, where all values are finite and no counts."""
        return None if measure in self.counts else _interval(list(self.values[measure].values()))


@dataclass(frozen=True)
class StudyResult:
    """A study as far as its runs are finished. `compared` are arms against their references, `gains` such differences
    against each other. `outcomes` has what the runs gave, the choice of rates included. `missing` are the others that
    the comparison needs.
    """

    scaled: ScaledStudy
    arms: Mapping[str, ArmResult]
    compared: tuple[Compared, ...]
    gains: tuple[Compared, ...]
    missing: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]

    def sources(self, name: str) -> list[str | None]:
        """The different values that outcomes have in `commit`, `code`, `data` or `machine`."""
        return list(dict.fromkeys(getattr(one, name) for one in self.outcomes))

    @property
    def evidence(self) -> str:
        """How strong it is, from the number of seeds of the deciding comparison that has the fewest."""
        if self.missing:
            return f"{counted(len(self.missing), 'run')} missing: no statement"
        fewest = min((len(one.differences) for one in self.deciding), default=0)
        words = {0: "no seed of both arms: not evidence", 1: "1 seed: not evidence", 2: "2 seeds: weak evidence"}
        return words.get(fewest, f"{fewest} seeds")

    @property
    def deciding(self) -> list[Compared]:
        """The comparisons in the measure that decides."""
        return [one for one in self.compared if one.measure == self.scaled.measures[0].name]

    @property
    def how_chosen(self) -> str:
        """How the rate of each arm was chosen, in words."""
        scale = self.scaled.scale
        if all(len(scale.rates_of(arm)) == 1 for arm in self.arms):
            return "one learning rate an arm, not chosen: arms are not compared at their best"
        if not self.scaled.chooses_apart:
            return "each arm's best rate was chosen on the compared runs themselves, which flatters every arm"
        seeds = ", ".join(map(str, scale.rate_seeds))
        steps = f" in runs of {scale.rate_steps:,} steps" if scale.rate_steps else ""
        return f"each arm's best rate was chosen on seeds {seeds}{steps}, which no comparison uses"

    def caveats(self) -> list[str]:
        """What weakens the result, in words."""
        chosen = [arm for arm in self.arms.values() if arm.chosen]
        without = [arm.name for arm in chosen if len(arm.by_rate) > 1 and not arm.is_usable]
        edges = [arm.name for arm in chosen if arm.chosen and arm.chosen.at_edge and arm.name not in without]
        deciding = self.scaled.rate_measure.name
        found = [f"the best rate is at an edge of its grid: {', '.join(edges)}"] if edges else []
        found += [f"no rate gave a finite {deciding}, so the lowest was taken: {', '.join(without)}"] if without else []
        found += [
            f"{arm.name}: {arm.diverged} of {counted(len(arm.runs), 'run')} diverged and counts as the worst"
            for arm in self.arms.values()
            if arm.diverged
        ]
        code, data = self.sources("code"), self.sources("data")
        # Runs of older releases have a commit alone.
        versions = code if any(code) else self.sources("commit")
        if len(versions) > 1:
            found.append(f"the runs are of {len(versions)} versions of the code")
        if len(data) > 1:
            found.append(f"the runs read {len(data)} datasets")
        return found

    @property
    def sentence(self) -> str:
        """What may be said, and no more."""
        deciding = self.deciding
        if self.missing or min((len(one.differences) for one in deciding), default=0) < 2:
            return f"{self.evidence}."
        gains = [one for one in self.gains if one.measure == self.scaled.measures[0].name]
        able = [one for one in (*deciding, *gains) if one.can_differ]
        parts = [self.evidence, *(one.sentence() for one in deciding if one.differs)]
        alike: dict[str, list[str]] = {}
        for one in deciding:
            if not one.differs:
                why = "" if one.interval else f" ({one.signs()})"
                alike.setdefault(why, []).append(f"{one.arm} - {one.reference}")
        for why, pairs in alike.items():
            parts.append(f"no difference in {deciding[0].measure} is shown for {', '.join(pairs)}{why}")
        parts += [one.sentence() for one in gains]
        if len(able) > 1:
            chance = SIGNIFICANT * len(able)
            parts.append(
                f"of {len(able)} comparisons of {deciding[0].measure}, {chance:.2g} would show a difference by chance"
            )
        if self.scaled.scale_name != "paper" and self.scaled.study.published:
            parts.append("this small scale says nothing about the order that the papers print")
        return f"{'; '.join(parts)}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `result.json` has them; non-finite ones become words there."""
        scaled, study = self.scaled, self.scaled.study
        return {
            "format": FORMAT,
            "study": scaled.name,
            "scale": scaled.scale_name,
            "question": study.question,
            "source": study.source,
            "not_shown": study.not_shown,
            "yardstick": study.yardstick,
            "study_sha256": scaled.sha256,
            "commits": self.sources("commit"),
            "code_sha256": self.sources("code"),
            "data_content_ids": self.sources("data"),
            "machines": self.sources("machine"),
            "trials": len(self.outcomes),
            **self._times(),
            "complete": not self.missing,
            "missing": [asdict(trial) for trial in self.missing],
            "measures": [{"name": one.name, **asdict(one)} for one in scaled.measures],
            "rate_measure": scaled.rate_measure.name,
            "rates": self.how_chosen,
            "arms": {arm.name: self._arm(arm) for arm in self.arms.values()},
            "comparisons": [asdict(one) | {"sentence": one.sentence()} for one in self.compared],
            "gains": [asdict(one) | {"sentence": one.sentence()} for one in self.gains],
            "published": [asdict(one) | {"ours": self.ours(one)} for one in study.published],
            "published_at": study.published_at,
            "published_higher_is_better": study.published_higher_is_better,
            "caveats": self.caveats(),
            "evidence": self.evidence,
            "sentence": self.sentence,
        }

    def _times(self) -> dict[str, float | None]:
        """When the first trial began and the last ended, and the seconds of all; None where one does not say."""
        began = [one.began for one in self.outcomes if one.began is not None]
        ended = [one.ended for one in self.outcomes if one.ended is not None]
        spent = [one.seconds for one in self.outcomes if one.seconds is not None]
        return {
            name: way(values) if values and len(values) == len(self.outcomes) else None
            for name, way, values in (("began", min, began), ("ended", max, ended), ("seconds", sum, spent))
        }

    def ours(self, printed: Published) -> str:
        """What this study found of a printed figure or relation, in the measure that decides, for each arm that stands
        for the printed one; "" if nothing yet."""
        arms = [arm for arm in self.arms.values() if (arm.stands_for or arm.name) == printed.arm and arm.runs]
        found = [(arm, self._ours(arm, printed)) for arm in arms]
        return "; ".join(f"{arm.name}: {told}" if arm.stands_for else told for arm, told in found if told)

    def _ours(self, arm: ArmResult, printed: Published) -> str:
        other, measure = self.arms.get(printed.better_than), self.scaled.measures[0]
        if printed.value is None:
            return _compared(other, arm, measure).sentence() if other and other.runs else ""
        mean, interval = arm.mean(measure.name), arm.interval(measure.name)
        if interval is not None:
            return f"{measure.name} {interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
        return "" if mean is None else f"{measure.name} {mean:.4g}"

    def _arm(self, arm: ArmResult) -> dict[str, Any]:
        names = [measure.name for measure in self.scaled.measures]
        intervals = {name: arm.interval(name) for name in names}
        return {
            "overrides": list(arm.overrides),
            "reference": arm.reference or None,
            "stands_for": arm.stands_for or None,
            "size": asdict(arm.size) if arm.size else None,
            "rate": arm.chosen.rate if arm.chosen else None,
            "rate_at_edge": arm.chosen.at_edge if arm.chosen else None,
            "by_rate": {f"{rate:g}": dict(values) for rate, values in arm.by_rate.items()},
            "diverged_by_rate": {f"{rate:g}": count for rate, count in arm.diverged_by_rate.items()},
            "seeds": list(arm.runs),
            "runs": list(arm.runs.values()),
            "values": {name: dict(arm.values[name]) for name in names},
            "means": {name: arm.mean(name) for name in names},
            "intervals": {name: asdict(found) if found else None for name, found in intervals.items()},
            "diverged": arm.diverged,
        }


def choose_rates(scaled: ScaledStudy, outcomes: Mapping[Trial, Outcome]) -> dict[str, Chosen] | None:
    """The best rate of every arm in the measure that chooses rates; None while a run that decides is not finished.

    Best is the rate at which fewest runs failed (diverged, never got there, have no value), then the best mean of the
    others, then the lower one.
    """
    deciding = scaled.rate_trials() if scaled.chooses_apart else scaled.compared_trials()
    if any(trial not in outcomes for trial in deciding):
        return None
    chosen, measure = {}, scaled.rate_measure
    for arm in scaled.arms:
        rates = scaled.scale.rates_of(arm)
        found: dict[float, list[float | None]] = {rate: [] for rate in rates}
        for trial in deciding:
            if trial.arm == arm:
                found[trial.rate].append(outcomes[trial].values[measure.name])
        best = min((*_rank(measure, values), rate) for rate, values in found.items())[-1]
        chosen[arm] = Chosen(best, len(rates) > 1 and best in (rates[0], rates[-1]))
    return chosen


def judge(scaled: ScaledStudy, outcomes: Mapping[Trial, Outcome]) -> StudyResult:
    """The result of the finished runs in `outcomes`."""
    chosen = choose_rates(scaled, outcomes)
    deciding = scaled.rate_trials() if scaled.chooses_apart else scaled.compared_trials()
    needed = scaled.compared_trials({arm: one.rate for arm, one in chosen.items()}) if chosen else deciding
    arms = {}
    for name, arm in scaled.arms.items():
        rate = chosen[name].rate if chosen else None
        own = {t.seed: outcomes[t] for t in needed if chosen and t in outcomes and (t.arm, t.rate) == (name, rate)}
        tried = [(t, outcomes[t]) for t in deciding if t.arm == name and t in outcomes]
        rates = scaled.scale.rates_of(name)
        arms[name] = ArmResult(
            name=name,
            overrides=arm.overrides,
            reference=arm.reference,
            chosen=chosen[name] if chosen else None,
            by_rate={
                rate: {t.seed: one.values[scaled.rate_measure.name] for t, one in tried if t.rate == rate}
                for rate in rates
            },
            values={m.name: {seed: one.values[m.name] for seed, one in own.items()} for m in scaled.measures},
            runs={seed: one.run_dir for seed, one in own.items()},
            diverged=sum(one.diverged for one in own.values()),
            diverged_by_rate={rate: sum(one.diverged for t, one in tried if t.rate == rate) for rate in rates},
            counts=tuple(measure.name for measure in scaled.measures if measure.kind in NO_INTERVAL),
            size=next((one.size for one in own.values()), None),
            stands_for=arm.stands_for,
        )
    compared = {
        (arm.name, measure.name): _compared(arms[arm.reference], arms[arm.name], measure)
        for arm in scaled.arms.values()
        if arm.reference
        for measure in scaled.measures
    }
    return StudyResult(
        scaled=scaled,
        arms=arms,
        compared=tuple(compared.values()),
        gains=tuple(_gain(arms, pair, measure) for pair in scaled.gains for measure in scaled.measures),
        missing=tuple(trial for trial in needed if trial not in outcomes),
        outcomes=tuple(outcomes.values()),
    )


def _compared(reference: ArmResult, arm: ArmResult, measure: Measure) -> Compared:
    theirs, ours = (
        {seed: value for seed, value in one.values[measure.name].items() if value is not None}
        for one in (reference, arm)
    )
    return paired(arm.name, reference.name, ours, theirs, measure)


def _gain(arms: Mapping[str, ArmResult], pair: Gains, measure: Measure) -> Compared:
    """The differences of two arms from their references, compared with each other. Two infinite values have no
    difference that could be compared: nan stands for it, and is neither better nor worse.
    """

    def differences(name: str) -> tuple[str, dict[int, float]]:
        arm, reference = arms[name], arms[arms[name].reference]
        known = {seed: (arm.values[measure.name][seed], reference.values[measure.name].get(seed)) for seed in arm.runs}
        label = f"({arm.name} - {reference.name})"
        return label, {seed: a - b for seed, (a, b) in known.items() if a is not None and b is not None}

    (ours, our), (theirs, their) = differences(pair.arm), differences(pair.other)
    return paired(ours, theirs, our, their, measure)


def _rank(measure: Measure, values: Sequence[float | None]) -> tuple[int, float]:
    usable = [value for value in values if value is not None and math.isfinite(value)]
    sign = -1.0 if measure.larger_is_better else 1.0
    return len(values) - len(usable), sign * float(np.mean(usable)) if usable else math.inf


def _interval(values: Sequence[float | None]) -> SeedInterval | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return over_seeds(known) if len(known) == len(values) else None
