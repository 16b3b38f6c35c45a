"""Replays an event of a run from the last saved state before it, unchanged and with one thing changed at a time.

The control comes first: it must give the recorded lines again, bit for bit. Otherwise the arms would differ from the
record by more than their change, and nothing is judged. Every replay is a run directory of its own under `place`. One
that is finished is not trained again, and one that was interrupted goes on.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from kha_train.analysis.causes import FOLDER, VERDICT_FILE, Arm, Excess, Verdict, excess, is_removed, judge, share_left
from kha_train.analysis.certify.certified import Bar
from kha_train.analysis.runs import RunData
from kha_train.analysis.spikes import evidence_of, recorded_curve, score_curve
from kha_train.checkpoint.hold import held
from kha_train.checkpoint.reader import Checkpoint, check_sizes
from kha_train.checkpoint.rewrite import with_state
from kha_train.config.build import nearest, to_plain
from kha_train.config.constants import PRECISION_OF, may_differ
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, DivergedError, KhaError, RunDirectoryInUse
from kha_train.operate.arms import ARMS, Case, Change, changes
from kha_train.operate.replay import compare_lines, most_named
from kha_train.operate.stretch import Launch, Stretch, compute, configuration, in_processes, leading_to, missing_data
from kha_train.record import Record, Redactor, read_metrics
from kha_train.record.files import read_json, write_json
from kha_train.stability.events import SpikeEvent
from kha_train.train.branch import SAME_LOSS
from kha_train.train.progress import read_state
from kha_train.train.resume import changed_settings

CONTROL, DONE_FILE = "control", "arm.json"
REPLAYS = 3
"""Replays of a change in which chance is involved."""
AT_LEAST, AT_MOST = 5, 50
"""Steps from the first one of an event that are replayed, as far as they were recorded: its own, within these."""


class DoneArm(TypedDict):
    """`DONE_FILE`: a replay that is finished, and its settings."""

    last: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Replaying:
    """How to replay: `arms` by name, the number of `replays` where chance is involved, the most `steps` of the event,
    the directory for all runs, how training is launched, and data that have `moved` (`open_case`). `tell` receives a
    line about each run."""

    arms: tuple[str, ...]
    place: Path
    tell: Callable[[str], None]
    bar: Bar
    replays: int = REPLAYS
    steps: int = AT_MOST
    launch: Launch = in_processes
    moved: Mapping[str, str] = field(default_factory=dict)


def event_of(run: RunData, number: int | None, step: int | None) -> SpikeEvent:
    """Event `number` of `run` (from 1, as `kha spikes` counts), or the one that holds `step`.

    Raises ConfigError when there is none, or a rewind undid it.
    """
    report = score_curve(recorded_curve(run.path, run.columns))
    if number is None:
        return _holding([*report.events, *_recorded(run, {event.start_step for event in report.events})], step)
    event = evidence_of(report, number)[0]
    if event in report.rewound:
        raise ConfigError(
            "a rewind undid this event, and its lines are no part of the curve",
            field="--event",
            value=number,
            fix=f"choose one that is not marked (rewound): kha spikes {run.path}",
        )
    return event


def _holding(events: Sequence[SpikeEvent], step: int | None) -> SpikeEvent:
    found = [event for event in events if step is not None and event.start_step <= step <= event.end_step]
    if not found:
        told = ", ".join(f"{event.start_step}..{event.end_step}" for event in events[:8]) or "none"
        raise ConfigError("no event holds this step", field="--step", value=step, allowed=f"a step of an event: {told}")
    return found[0]


def _recorded(run: RunData, known: set[int]) -> Iterator[SpikeEvent]:
    """The events that were recorded during training, other than those that begin at `known` steps. A branch takes over
    its parent's detectors, and so sees events that its own lines do not show.
    """
    firsts = dict(zip(run.steps.tolist(), run.columns.whole("samples_first", -1).tolist(), strict=True))
    ends = {one.get("start_step"): one.get("end_step") for one in run.events if one["kind"] == "spike_closed"}
    rates = dict(zip(run.steps.tolist(), run.columns["train/lr"].tolist(), strict=True))
    for one in run.events:
        step = one["step"]
        if one["kind"] != "spike_opened" or step in known or firsts.get(step, math.nan) != one.get("samples_first"):
            continue
        loss, baseline, z = (one.get(key, math.nan) for key in ("loss", "baseline", "z"))
        scale = (loss - baseline) / z if math.isfinite(z) and z > 0 else math.nan
        inside = run.steps <= max(step, ends.get(step) or int(run.steps[-1]))
        end = int(run.steps[inside][-1])
        last = int(run.columns.whole("samples_last", -1)[inside][-1])
        yield SpikeEvent(step, end, 0, rates[step], firsts[step], last, baseline, scale, math.nan)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """`names` in the order of `ARMS`; all of them if none is given. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in ARMS:
            raise ConfigError("no such arm", field="--arms", value=name, **nearest(name, ARMS))
    return tuple(name for name in ARMS if not names or name in names)


def place_of(run: RunData, event: SpikeEvent) -> Path:
    """Where the replays of `event` lie, unless another place is chosen."""
    return run.path / FOLDER / f"step-{event.start_step:08d}"


def open_case(
    run: RunData, event: SpikeEvent, place: Path, steps: int = AT_MOST, moved: Mapping[str, str] | None = None
) -> Case:
    """What a replay of `event` needs; `moved` says where data lie that have moved, old directory -> new one. Raises
    ConfigError with the reason when it cannot be computed here."""
    stretch = leading_to(run, event.start_step, _last_step(run, event, steps), moved or {})
    if stretch.obstacle:
        gone = missing_data(stretch.config or {})
        raise ConfigError(
            f"steps {stretch.first + 1} to {stretch.last} cannot be computed again here: {stretch.obstacle}",
            field="run",
            value=str(run.path),
            allowed="a run whose control can be bit-equal",
            fix=f"say where they are: --data {shlex.quote(gone[0])}=DIRECTORY" if gone else None,
        )
    stretch = replace(stretch, source=_source(stretch, place))
    assert stretch.attempt is not None
    dtype = str(stretch.attempt.facts.get("dtype"))
    return Case(event, stretch, configuration(stretch, place), PRECISION_OF.get(dtype, ""), place)


def _source(stretch: Stretch, place: Path) -> Path | None:
    """The checkpoint that the stretch begins with. Where the run was restarted there with settings that change its
    loss, it is one with the same tensors and those settings: the run went on with its detectors, and a branch would
    reset them.
    """
    if stretch.source is None:
        return None
    checkpoint = Checkpoint(stretch.source, check_sizes(stretch.source))
    config, state = configuration(stretch, place), checkpoint.trainer_state
    changed = changed_settings(config, read_state(checkpoint, row_may_change=True).config)
    own = stretch.source.resolve().is_relative_to(stretch.run.path.resolve())
    if not own or all(may_differ(key, SAME_LOSS) for key, _, _ in changed):
        return stretch.source
    plain = Redactor.from_environment().clean(to_plain(config))
    return with_state(checkpoint, place / "restarted", {**state, "config": plain})


def _last_step(run: RunData, event: SpikeEvent, steps: int) -> int:
    """The last step to replay: of the event, or a few after it, by the attempt that made its first line."""
    attempts = run.columns.whole("attempt", 1)
    own = attempts[run.steps == event.start_step][0]
    wanted = min(max(event.end_step, event.start_step + AT_LEAST - 1), event.start_step + steps - 1)
    return min(wanted, int(run.steps[attempts == own][-1]))


def replay_event(run: RunData, event: SpikeEvent, how: Replaying) -> Verdict:
    """Replay `event` of `run` with every arm, and judge. The verdict is in `VERDICT_FILE` of the place; if that lies in
    the run, also an event `replayed` of the run, unless another process writes its record.

    Raises ConfigError when the event cannot be replayed here, or the place holds another replay; KhaError when the
    control fails.
    """
    case = open_case(run, event, how.place, how.steps, how.moved)
    with ExitStack() as holds:
        if case.stretch.source is not None:
            holds.enter_context(held(case.stretch.source))
        where = f"steps {case.stretch.first + 1} to {case.stretch.last}"
        how.tell(f"control: {where} of {run.label} again")
        _train(case, how, CONTROL, case.config)
        _, _, differences = compare_lines(case.stretch, how.place / CONTROL / "run")
        kinds = {} if differences else {name: ARMS[name] for name in how.arms}
        arms = tuple(_arm(case, how, *made) for made in changes(case, kinds, how.replays))
    if differences:
        cause, answer = None, f"not judged: the control differs from the record in {where}: {differences[0]}"
    else:
        cause, answer = judge(arms)
    verdict = Verdict(
        run_id=str(run.run.get("run_id", "")),
        start_step=event.start_step,
        end_step=event.end_step,
        first=case.stretch.first + 1,
        last=case.stretch.last,
        source=str(case.stretch.source or ""),
        answer=answer,
        cause=cause,
        differences=most_named(differences),
        arms=arms,
    )
    write_json(how.place / VERDICT_FILE, verdict.to_dict())
    if how.place.resolve().is_relative_to(run.path.resolve()):
        _record(run, verdict, how)
    return verdict


def _arm(case: Case, how: Replaying, name: str, family: str, change: Change | str) -> Arm:
    """Train the replays of one change, and compare them with the control."""
    if isinstance(change, str):
        return Arm(name, family, "", "", reason=change)
    control = _excess(case, how.place / CONTROL / "run")
    removed, left, runs = [], [], []
    for number, config in enumerate(change.configs, start=1):
        label = name if len(change.configs) == 1 else f"{name}-{number}"
        how.tell(f"{label}: {change.words}")
        try:
            _train(case, how, label, config)
        except KhaError as error:
            return Arm(name, family, change.words, change.accuses, reason=str(error))
        found = _excess(case, how.place / label / "run")
        removed.append(is_removed(found, control))
        left.append(share_left(found, control))
        runs.append(str(how.place / label / "run"))
    return Arm(name, family, change.words, change.accuses, tuple(removed), tuple(left), tuple(runs))


def _excess(case: Case, run_dir: Path) -> Excess:
    return excess(read_metrics(run_dir), case.event, case.stretch.first, case.stretch.last)


def _train(case: Case, how: Replaying, label: str, config: RunConfig) -> None:
    """Train one replay in `place / label`, unless it is done. Divergence is a result like any other.

    Raises ConfigError when another replay is there, KhaError when training refuses or fails.
    """
    place, file = how.place / label, how.place / label / DONE_FILE
    config = replace(config, run=replace(config.run, dir=str(place / "run"), name=label))
    plain = to_plain(config)
    done = read_json(file, DoneArm)
    if done is not None:
        if done["last"] == case.stretch.last and done["config"] == plain:
            return
        raise ConfigError(
            "another replay is there, of other steps or settings",
            field="--out",
            value=str(place),
            fix="move it away, or choose another directory: --out DIRECTORY",
        )
    place.mkdir(parents=True, exist_ok=True)
    with how.bar(label, case.stretch.last - case.stretch.first) as advance:
        try:
            compute(case.stretch, place, how.launch, advance, lambda _: config)
        except DivergedError:
            how.tell(f"{label}: diverged")
    write_json(file, {"last": case.stretch.last, "config": plain})


def _record(run: RunData, verdict: Verdict, how: Replaying) -> None:
    """Append the verdict to the events of the run, if no process writes them."""
    try:
        record = Record.open(run.path)
    except (RunDirectoryInUse, OSError) as error:
        how.tell(f"the verdict is in {how.place} alone: {error}")
        return
    try:
        arms = {arm.name: arm.words for arm in verdict.arms}
        record.event("replayed", verdict.start_step, cause=verdict.cause, answer=verdict.answer, arms=arms)
    finally:
        record.close()
