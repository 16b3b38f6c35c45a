"""Runs a study: its points are those of a sweep, named after arm, rate and seed, in `<parent>/<study>-<scale>`.

A study whose rates are chosen on seeds of their own has two rounds: the runs that choose, then the compared ones at the
best rates. Everything follows from the directories: the same command starts what is missing, resumes what was stopped
or killed, leaves what is finished, and goes on with the next round.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.difference_law import law_of
from kha_train.analysis.report.page import write_report
from kha_train.analysis.studies import ScaledStudy, Trial
from kha_train.analysis.study_outcomes import Outcome, outcome_of
from kha_train.analysis.study_page import study_page
from kha_train.analysis.study_results import StudyResult, judge
from kha_train.config.compose import compose
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError, KhaError
from kha_train.operate.compressed_arms import able_to_begin, beginning, start_of
from kha_train.operate.computed import compute_points, computed_outcome, computed_points
from kha_train.operate.datasets import dataset_overrides
from kha_train.operate.local import run_points
from kha_train.operate.slurm import JobOptions, Started, start_missing
from kha_train.operate.status import RunStatus
from kha_train.operate.sweep import Point, check_against_runs, missing, plan_points, save_sweep, statuses
from kha_train.record import first_failure_line
from kha_train.record.files import write_json, write_text

OF_THE_STUDY = ("run.dir", "run.name", "run.seed", "optim.lr")
"""Settings of every point that a study sets itself."""
OF_A_COMPUTATION = ("rate", "seed", "steps")
"""The same where trials are computations."""
RESULT_FILE, PAGE_FILE, REPORTS = "result.json", "result.md", "report"
WAIT_SECONDS = 2.0
"""How often a run that another process trains is looked at."""


@dataclass(frozen=True)
class StudyPlan:
    """A study with a validated point for every run that it may need, whichever rates turn out best. `given` are the
    settings from the command line, which no file has.
    """

    scaled: ScaledStudy
    directory: Path
    points: Mapping[Trial, Point]
    given: tuple[str, ...] = ()


@dataclass
class Progress:
    """How far a local study is: points of this round that are training, and all that is known of the time left."""

    finished: int = 0
    needed: int = 0
    training: Sequence[Point] = ()
    began: float = field(default_factory=time.monotonic)
    work_done: float = 0.0
    work_left: float = 0.0

    def seconds_left(self) -> float | None:
        """From the FLOPs of this call's finished points and the time they took; None before the first."""
        return (time.monotonic() - self.began) * self.work_left / self.work_done if self.work_done else None


Watch = Callable[[Progress], None]


def plan_study(scaled: ScaledStudy, directory: Path, overrides: Sequence[str] = ()) -> StudyPlan:
    """The points of a study in `directory`, each composed and validated; writes nothing. `overrides` apply to all.

    Raises ConfigError for a setting that the study sets itself, and as `plan_points` does.
    """
    # With `rate_steps` there are two budgets: one setting would be both.
    ours = (OF_A_COMPUTATION if scaled.computes else OF_THE_STUDY) + ("run.steps",) * bool(scaled.scale.rate_steps)
    own = [text for text in overrides if text.partition("=")[0].lstrip("+~") in ours]
    if own:
        key, _, value = own[0].partition("=")
        raise ConfigError("is set by the study", field=key, value=value, fix="leave it out")
    # Without a choice that is made apart, the runs that choose are the compared ones.
    roles = [trials for trials in (scaled.rate_trials(), scaled.compared_trials()) if trials]
    points: dict[Trial, Point] = {}
    for trials in roles:
        settings = [_overrides(scaled, trial, directory, overrides) for trial in trials]
        labels = [_label(scaled, trial) for trial in trials]
        if scaled.computes:
            made = computed_points(scaled, directory, settings, labels)
        else:
            made = plan_points(directory, settings, scaled.scale.equal, labels)
        points |= zip(trials, made, strict=True)
    return StudyPlan(scaled, directory, points, tuple(overrides))


def _overrides(scaled: ScaledStudy, trial: Trial, directory: Path, given: Sequence[str]) -> list[str]:
    """The settings of a trial. Of several for one key the last counts: common, the arm's, those given."""
    scale = scaled.scale
    steps = scale.rate_steps if trial.role == "rate" and scale.rate_steps else scale.steps
    if scaled.computes:
        own = (f"steps={steps}", f"rate={trial.rate:#g}", f"seed={trial.seed}")
        return _last_of_each([*scale.overrides, *scaled.arms[trial.arm].overrides, *given, *own])
    arm = scaled.arms[trial.arm]
    common = [f"run.steps={steps}", *dataset_overrides(scale.dataset, directory.parent), *scale.overrides]
    if arm.compresses:
        common += scaled.arms[arm.compresses.arm].overrides
        before = _last_of_each([*common, *given])
        common += beginning(before, arm.compresses, start_of(directory, arm.compresses, trial.seed))
    return _last_of_each([*common, *arm.overrides, *given, f"optim.lr={trial.rate:g}", f"run.seed={trial.seed}"])


def _last_of_each(settings: Sequence[str]) -> list[str]:
    return list({text.partition("=")[0]: text for text in settings}.values())


def _label(scaled: ScaledStudy, trial: Trial) -> str:
    steps = scaled.scale.rate_steps if trial.role == "rate" else 0
    return f"{trial.arm}-lr{trial.rate:g}-s{trial.seed}" + (f"-n{steps}" if steps else "")


def finished_runs(
    plan: StudyPlan, known: Mapping[Trial, Outcome] | None = None, *, rates_only: bool = False
) -> dict[Trial, Outcome]:
    """What every finished run of the study gave: trained to its end, or diverged. `known` are not read again. With
    `rates_only`, as for a run that only chooses a rate, nothing but the measure that chooses is read.

    Raises ConfigError when a directory holds another run than the study's, DataError when a record is damaged.
    """
    found = dict(known or {})
    if plan.scaled.computes:
        given = {trial: computed_outcome(point, plan.scaled) for trial, point in plan.points.items()}
        return {trial: one for trial, one in given.items() if one is not None}
    left = [trial for trial in plan.points if trial not in found and Path(plan.points[trial].run_dir).exists()]
    standing = statuses([plan.points[trial] for trial in left])
    ended = [trial for trial, status in zip(left, standing, strict=True) if is_finished(status)]
    check_against_runs(plan.points[trial] for trial in ended)
    choosing = (plan.scaled.rate_measure,)
    return found | {
        trial: outcome_of(
            Path(plan.points[trial].run_dir),
            choosing if rates_only or trial.role == "rate" else plan.scaled.measures,
        )
        for trial in ended
    }


def is_finished(status: RunStatus) -> bool:
    """Whether a run needs no further start. One that diverged is a result, although it did not reach its last step."""
    return status.state == "done" or (status.state == "fatal" and status.diverged)


def run_here(plan: StudyPlan, processes: int, parallel: int, retry_failed: bool, watch: Watch) -> StudyResult:
    """Train what the study lacks on this machine, round after round, and return its result.

    Raises ConfigError for a batch that `processes` ranks cannot share, KhaError when a run failed, after the others of
    its round, and KeyboardInterrupt after a signal, when all runs have saved.
    """
    if not plan.scaled.computes:
        # The batch is the arm's, whatever its rate and seed.
        for point in {trial.arm: point for trial, point in plan.points.items()}.values():
            validate_batch(compose(point.overrides), processes)
    progress, known, tried = Progress(), dict[Trial, Outcome](), set[str]()
    while True:
        known = finished_runs(plan, known)
        result = judge(plan.scaled, known)
        if not result.missing:
            return result
        lacking = [plan.points[trial] for trial in result.missing]
        standing = statuses(lacking)
        untried = [point for point in missing(lacking, standing, retry_failed) if point.label not in tried]
        start = able_to_begin(plan.scaled, plan.directory, plan.points, untried, known)
        _look(plan, progress, known, result)
        if start:
            tried |= {point.label for point in start}
            show = partial(_show, watch, progress, start)
            if plan.scaled.computes:
                compute_points(plan.scaled.study.trials, start, show)
            else:
                check_against_runs(start)
                save_sweep(plan.directory, lacking, plan.scaled.scale.equal)
                run_points(plan.directory, start, processes, show, parallel)
            progress.work_done += sum(point.flops for point in start)
        elif any(status.state == "running" for status in standing):
            # Another process trains it, or was killed a moment ago.
            watch(progress)
            time.sleep(WAIT_SECONDS)
        elif not any(is_finished(status) for status in standing):
            # One that is finished has ended since `known` was read.
            raise _failed(plan, lacking, standing)


def _look(plan: StudyPlan, progress: Progress, known: Mapping[Trial, Outcome], result: StudyResult) -> None:
    """Counts what is finished and what is left, the round that is still to be chosen included."""
    left = [plan.points[trial] for trial in result.missing]
    chosen = all(arm.chosen for arm in result.arms.values())
    if plan.scaled.chooses_apart and not chosen:
        # Which rate will be best is not known, but every rate costs the same.
        lowest = {arm: plan.scaled.scale.rates_of(arm)[0] for arm in plan.scaled.arms}
        left += [plan.points[trial] for trial in plan.scaled.compared_trials(lowest)]
    progress.finished, progress.needed = len(known), len(known) + len(left)
    progress.work_left = sum(point.flops for point in left)


def _show(
    watch: Watch, progress: Progress, round_of: Sequence[Point], training: Sequence[Point], waiting: Sequence[Point]
) -> None:
    """Tell `watch` how far the points `round_of` are."""
    begun = len(round_of) - len(waiting)
    ended = [point for point in round_of[:begun] if point not in training]
    work = sum(point.flops for point in ended)
    watch(
        replace(
            progress,
            finished=progress.finished + len(ended),
            training=training,
            work_done=progress.work_done + work,
            work_left=progress.work_left - work,
        )
    )


def _failed(plan: StudyPlan, points: Sequence[Point], standing: Sequence[RunStatus]) -> KhaError:
    told = [
        f"{point.label} ({first_failure_line(Path(point.run_dir)) or status.state})"
        for point, status in zip(points, standing, strict=True)
    ]
    fatal = "; add --retry-failed for fatal ones" if any(status.state == "fatal" for status in standing) else ""
    return KhaError(
        f"{len(told)} runs are missing: {', '.join(told)}",
        field="kha study",
        fix=f"see {plan.directory}/logs; the same command continues{fatal}",
    )


def submit_study(plan: StudyPlan, options: JobOptions, retry_failed: bool) -> tuple[StudyResult, Started | None]:
    """Submit the missing runs of the present round as one job array; the result so far, and what was started (None:
    the study is complete). Raises ConfigError for a study of computations, and as `start_missing` does.
    """
    if plan.scaled.computes:
        raise ConfigError(
            "is computed here, and not on SLURM", field="study", value=plan.scaled.name, fix="add --local"
        )
    known = finished_runs(plan)
    result = judge(plan.scaled, known)
    if not result.missing:
        return result, None
    lacking = [plan.points[trial] for trial in result.missing]
    points = able_to_begin(plan.scaled, plan.directory, plan.points, lacking, known)
    return result, start_missing(
        plan.directory, points, options, equal=plan.scaled.scale.equal, retry_failed=retry_failed
    )


def write_results(plan: StudyPlan, result: StudyResult) -> list[Path]:
    """Write `result.json`, `result.md`, and for every reference the comparison report of its arms; returns the paths.

    The report compares the finished runs at the chosen rates, which differ by design.
    """
    plan.directory.mkdir(parents=True, exist_ok=True)
    pages = {
        reference: write_report(compare_runs(runs, varied=("optim.lr",)), plan.directory / REPORTS / reference)
        for reference, runs in ({} if plan.scaled.computes else _groups(result)).items()
    }
    law = law_of(result)
    answer = result.to_dict() | {
        "difference_law": law.to_dict() if law else None,
        "command": command_of(plan),
        "given": list(plan.given),
        "reports": {reference: str(page) for reference, page in pages.items()},
    }
    write_json(plan.directory / RESULT_FILE, answer)
    links = {name: page.relative_to(plan.directory).as_posix() for name, page in pages.items()}
    write_text(plan.directory / PAGE_FILE, study_page(result, links, plan.given))
    return [plan.directory / RESULT_FILE, plan.directory / PAGE_FILE, *pages.values()]


def command_of(plan: StudyPlan) -> str:
    """What to type to repeat the study; only the paper scale needs a cluster."""
    found = plan.scaled
    scale = [] if found.scale_name == "cpu" else ["--scale", found.scale_name]
    where = scale if found.scale_name == "paper" else [*scale, "--local"]
    return shlex.join(["kha", "study", "run", found.name, *plan.given, *where])


def _groups(result: StudyResult) -> dict[str, list[Path]]:
    """The runs of every reference and of the arms compared with it, those of the reference first."""
    found: dict[str, list[Path]] = {}
    for arm in result.arms.values():
        if arm.reference and arm.runs and result.arms[arm.reference].runs:
            own = found.setdefault(arm.reference, [Path(run) for run in result.arms[arm.reference].runs.values()])
            own += map(Path, arm.runs.values())
    return found
