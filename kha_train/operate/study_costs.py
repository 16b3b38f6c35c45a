"""What a study costs before anything runs: work, time and money of every run and in all, and whether each arm fits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kha_train.analysis.studies import Trial
from kha_train.analysis.study_outcomes import Outcome
from kha_train.analysis.study_results import choose_rates
from kha_train.config.compose import compose
from kha_train.estimate.plan import Plan, make_plan
from kha_train.operate.computed import needs_of
from kha_train.operate.study import StudyPlan
from kha_train.operate.sweep import Point


@dataclass(frozen=True)
class RunCost:
    """One run of a study: its budget, and its time and cost where they are known. `finished`: it need not be paid."""

    trial: Trial
    label: str
    steps: int
    tokens: int
    flops: float
    seconds: float | None
    cost: float | None
    finished: bool


@dataclass(frozen=True)
class ArmFit:
    """Whether an arm's runs can start on the machine that the study names. `needs` says what is lacking ("": nothing);
    `fits` is None where the memory of a device is not known.
    """

    arm: str
    machine: str
    devices: int
    memory_gib: float
    fits: bool | None
    needs: str


@dataclass(frozen=True)
class StudyCosts:
    """Costs of every run. Where rates are chosen apart, `runs` has the compared runs of each arm at its best rate; at
    its lowest while that is not known, because every rate costs the same. `basis` says where the seconds are from.
    """

    runs: tuple[RunCost, ...]
    fits: tuple[ArmFit, ...]
    basis: str

    def seconds(self, finished: bool = True) -> float | None:
        """The time of all runs, one after another; without the `finished` ones if so asked. None: not known."""
        chosen = [run.seconds for run in self.runs if finished or not run.finished]
        known = [seconds for seconds in chosen if seconds is not None]
        return sum(known) if len(known) == len(chosen) else None

    def cost(self) -> float | None:
        """The cost of all runs; None where no price is known."""
        known = [run.cost for run in self.runs if run.cost is not None]
        return sum(known) if known and len(known) == len(self.runs) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "runs": [asdict(run) for run in self.runs],
            "arms": [asdict(fit) for fit in self.fits],
            "total": {
                "runs": len(self.runs),
                "finished": sum(run.finished for run in self.runs),
                "tokens": sum(run.tokens for run in self.runs),
                "flops": sum(run.flops for run in self.runs),
                "seconds": self.seconds(),
                "seconds_left": self.seconds(finished=False),
                "cost": self.cost(),
            },
            "time_is_based_on": self.basis,
        }


def study_costs(plan: StudyPlan, finished: Mapping[Trial, Outcome]) -> StudyCosts:
    """The costs of a study, from its `finished` runs if there are any, else from the assumed MFU of its machine.

    Raises as `make_plan` does.
    """
    scaled = plan.scaled
    rates = {arm: scaled.scale.rates_of(arm)[0] for arm in scaled.arms}
    rates |= {arm: one.rate for arm, one in (choose_rates(scaled, finished) or {}).items()}
    trials = [*scaled.rate_trials(), *scaled.compared_trials(rates)]
    estimate = _computed if scaled.computes else _trained
    fits, step_seconds, prices, basis = estimate(plan)
    measured = _seconds_per_flop(plan, finished)
    runs = []
    for trial in trials:
        point, step = plan.points[trial], step_seconds[trial.arm]
        pace = measured.get(trial.arm, measured.get("")) if measured else None
        planned = None if step is None else step * point.steps
        seconds = pace * point.flops if pace is not None else planned
        price = prices[trial.arm]
        cost = seconds / 3600 * price if seconds is not None and price else None
        ended = trial in finished
        runs.append(RunCost(trial, point.label, point.steps, point.tokens, point.flops, seconds, cost, ended))
    return StudyCosts(tuple(runs), fits, _basis(basis, finished))


class _Estimate(NamedTuple):
    """What is known before a trial: by arm, what it needs, the seconds of a step and the price of an hour; and what the
    seconds are based on.
    """

    fits: tuple[ArmFit, ...]
    step_seconds: Mapping[str, float | None]
    prices: Mapping[str, float]
    basis: str


def _trained(plan: StudyPlan) -> _Estimate:
    plans = {arm: make_plan(compose(_any_point(plan, arm).overrides)) for arm in plan.scaled.arms}
    clusters = {arm: one.config.cluster for arm, one in plans.items()}
    cluster = next(iter(clusters.values()))
    basis = "nothing: the speed of the machine is not known; name one with cluster=..."
    if cluster.peak_tflops:
        speed = f"{cluster.devices} x {cluster.peak_tflops:g} TFLOP/s at {cluster.mfu:.0%} MFU"
        basis = (
            f"an assumption, not a measurement: cluster {cluster.name}, {speed}; start, validation and saving left out"
        )
    return _Estimate(
        tuple(_fit(arm, one) for arm, one in plans.items()),
        {arm: one.time["step_seconds"] for arm, one in plans.items()},
        {arm: one.devices * one.price_per_hour for arm, one in clusters.items()},
        basis,
    )


def _computed(plan: StudyPlan) -> _Estimate:
    kind = plan.scaled.study.trials
    needs = {arm: needs_of(kind, _any_point(plan, arm)) for arm in plan.scaled.arms}
    return _Estimate(
        tuple(ArmFit(arm, "this machine", 1, memory, None, "") for arm, (_, memory) in needs.items()),
        {arm: seconds for arm, (seconds, _) in needs.items()},
        dict.fromkeys(needs, 0.0),
        "some steps of each arm, timed now on made-up data; preparing and scoring left out",
    )


def _any_point(plan: StudyPlan, arm: str) -> Point:
    return next(point for trial, point in plan.points.items() if trial.arm == arm)


def _seconds_per_flop(plan: StudyPlan, finished: Mapping[Trial, Outcome]) -> dict[str, float]:
    """The median pace of every arm's finished runs, and of all of them under ""."""
    paces: dict[str, list[float]] = {}
    for trial, outcome in finished.items():
        if outcome.seconds and not outcome.diverged:
            for name in ("", trial.arm):
                paces.setdefault(name, []).append(outcome.seconds / plan.points[trial].flops)
    return {name: statistics.median(values) for name, values in paces.items()}


def _basis(before: str, finished: Mapping[Trial, Outcome]) -> str:
    timed = sum(bool(outcome.seconds and not outcome.diverged) for outcome in finished.values())
    if timed:
        return (
            f"the finished runs of this study ({timed}), as many at a time as then; the start of a process is left out"
        )
    return before


def _fit(arm: str, plan: Plan) -> ArmFit:
    lacks = [problem for problem in (plan.batch_problem, plan.data_problem) if problem]
    if plan.fits is False:
        lacks.insert(0, f"memory: {plan.together or 'no number of these devices is enough'}")
    cluster = plan.config.cluster
    needs = "; ".join(lacks)
    return ArmFit(arm, cluster.name, cluster.devices, plan.memory.total / 2**30, plan.fits, needs)
