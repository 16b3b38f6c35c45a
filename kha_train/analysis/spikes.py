"""Spike statistics of a finished or live curve: a run directory, or a file of any framework.

The monitor that runs during training is run over the recorded curve, so both give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.analysis.curve_points import Points, field_of
from kha_train.analysis.history import phase_steps
from kha_train.analysis.statistics import pooled_rate
from kha_train.errors import ConfigError, DataError, between
from kha_train.foreign.files import read_regular
from kha_train.record import read_discarded, read_events, read_run
from kha_train.record.actions import UNDONE, count_actions
from kha_train.record.columns import Columns
from kha_train.record.columns_twin import read_columns
from kha_train.record.labels import distinct
from kha_train.record.reader import METRICS_FILE
from kha_train.stability.columns import READ as FILES
from kha_train.stability.document import distinct_steps, known_only, scores_of, tokens_between
from kha_train.stability.errors import CurveError, DamagedCurveError
from kha_train.stability.events import Observation, SpikeEvent
from kha_train.stability.files import read_curve as read_foreign
from kha_train.stability.found import Found, find_events, rewound_events
from kha_train.stability.statistics import BILLION, shared_events, summarise, tail_gap

READ = f"a run directory, or {FILES}"
"""What `kha spikes` reads, as its errors say it."""
AROUND = (
    "step", "train/loss", "spike/z", "train/grad_norm", "train/lr", "train/skipped", "moe/maxvio", "attn/max_logit",
    "kha/from_identity",
)  # fmt: skip
"""The metrics shown for the steps around an event."""
MARGIN, SHOWN = 5, 10
"""Number of steps shown before and after an event, and the maximum number of its own steps."""


@dataclass(frozen=True)
class LossCurve:
    """A curve step by step. `planned` are steps with an intended change; `repeated` counts steps that the file holds
    more than once (the last is used). `run_dir` is None for a foreign curve; `path` is the path as the user named it.
    """

    label: str
    points: Sequence[Observation]
    planned: frozenset[int]
    repeated: int = 0
    run_dir: Path | None = None
    path: Path | None = None

    @property
    def place(self) -> Path | None:
        """The resolved run directory or file: equal for two names of one curve. None for a curve without a file."""
        if self.path is None:
            return None
        place = self.path.resolve()
        return place.parent if self.path.name == METRICS_FILE else place

    @property
    def has_tokens(self) -> bool:
        """Whether the number of tokens read is known at each step: a count that rises with every point."""
        if len(self.points) == 1:
            return self.points[0].step == 1 and self.points[0].tokens > 0
        return bool((np.diff(field_of(self.points, "tokens")) > 0).all())

    @property
    def has_samples(self) -> bool:
        """Whether the sample numbers of the steps are known."""
        return bool((field_of(self.points, "samples_first") >= 0).all())

    @property
    def tokens(self) -> int:
        """Tokens of the steps of this curve; the first step is counted as an average one. 0: unknown."""
        return tokens_between(self.points[0], self.points[-1]) if self.has_tokens else 0


@dataclass(frozen=True)
class SpikeReport:
    """The score of a curve. `rewound` are events in lines that a rewind undid; they count unless disabled. `scores` are
    the published percentages at the end of the curve, None where it was too short. `steps` and `tokens` of the
    `summary` are the exposure of its rates. `judged`: the curve was long enough for the detector to judge a step, or it
    has an event; otherwise its rates are None.
    """

    curve: LossCurve
    events: tuple[SpikeEvent, ...]
    rewound: tuple[SpikeEvent, ...]
    scores: dict[str, float | None]
    summary: dict[str, Any]
    actions: dict[str, int]
    judged: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values; non-finite numbers become words in JSON."""
        rewound = [{**event.to_dict(), "rewound": True} for event in self.rewound]
        events = [{**event.to_dict(), "rewound": False} for event in self.events] + rewound
        summary = dict(self.summary)
        return {
            "label": self.curve.label,
            "events": sorted(events, key=lambda event: event["start_step"]),
            "scores": self.scores,
            "rates": summary.pop("rates"),
            "summary": {**summary, "rewound_events": len(self.rewound), "repeated_steps": self.curve.repeated},
            "actions": self.actions,
        }


def read_curve(path: Path, planned: Sequence[int] = ()) -> LossCurve:
    """The curve of a run directory, of its metrics file, or of a file of any framework: see `stability.files`.

    Raises ConfigError when there is none or the kind is unknown, DataError when a value cannot be read.
    """
    if not path.exists():
        raise ConfigError("no such file or run directory", field="curve", value=str(path))
    file = path / METRICS_FILE if path.is_dir() else path
    own = file.name == METRICS_FILE and (file.parent / "config.yaml").is_file()
    if own:
        return recorded_curve(path, read_columns(file.parent), planned)
    if file.exists():
        points = _foreign_points(file)
    else:
        raise ConfigError(f"it has no {METRICS_FILE}, so no steps", field="curve", value=str(path), allowed=READ)
    if not points:
        raise ConfigError("it has no step with a loss", field="curve", value=str(path), allowed=READ)
    ordered, repeated = distinct_steps(points)
    return LossCurve(_label(path), ordered, frozenset(planned), repeated, None, path)


def _foreign_points(file: Path) -> list[Observation]:
    try:
        return read_foreign(read_regular(file) or b"", str(file))
    except CurveError as error:
        kind = DataError if isinstance(error, DamagedCurveError) else ConfigError
        allowed, fix = READ if error.allowed == FILES else error.allowed or None, error.fix or None
        raise kind(error.problem, field=error.field, value=error.value, allowed=allowed, fix=fix) from error


def recorded_curve(path: Path, columns: Columns, planned: Sequence[int] = ()) -> LossCurve:
    """The curve of a run from the `columns` of its record; `path` is its directory or its metrics file.

    Raises ConfigError when it has no step with a loss.
    """
    run_dir, points = path if path.is_dir() else path.parent, Points(columns)
    if not len(points):
        raise ConfigError("it has no step with a loss", field="curve", value=str(path), allowed=READ)
    changes = frozenset({*planned, *phase_steps(run_dir, columns)})
    return LossCurve(_label(path), points, changes, 0, run_dir, path)


def _label(path: Path) -> str:
    return path.resolve().parent.name if path.name == METRICS_FILE else path.name or path.resolve().name


def read_curves(paths: Sequence[Path], read: Callable[[Path], LossCurve] = read_curve) -> list[LossCurve]:
    """The curve of every path, loaded by `read`. Raises as `read`, and ConfigError for a path named twice."""
    curves = [read(path) for path in paths]
    places = [curve.place for curve in curves]
    twice = [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError("this curve is named twice", field="curves", value=twice[-1], fix="name every curve once")
    return curves


def score_curve(
    curve: LossCurve, include_rewound: bool = True, diverged: bool = False, found: Found | None = None
) -> SpikeReport:
    """Run the monitor over `curve` and summarise. `diverged` says that the run is about to end with exit code 5, which
    is not in its record yet. `found` is what the monitor found during training, in a run without rewinds.
    """
    undone = _undone_lines(curve) if include_rewound else []
    if found is None or undone:
        found = find_events(curve.points, curve.planned, keep_at={group[0].step for group in undone})
    survived = {(point.step, point.samples_first) for point in curve.points} if undone else set()
    rewound = rewound_events(undone, survived, curve.planned, found.kept)
    summary = summarise(
        [*found.events, *rewound.events],
        first_step=curve.points[0].step,
        last_step=curve.points[-1].step,
        tokens=curve.tokens,
        # Steps that were replayed unchanged count once.
        undone_steps=[step for step, _ in {(p.step, p.samples_first) for group in undone for p in group} - survived],
        diverged=diverged or bool(found.diverged_at or rewound.diverged_at) or _ended_diverged(curve.run_dir),
    )
    judged = bool(found.judged or found.events or rewound.events)
    return SpikeReport(
        curve=curve,
        events=tuple(found.events),
        rewound=tuple(rewound.events),
        scores=scores_of(found.metrics),
        summary=known_only(summary, judged),
        actions=count_actions(curve.run_dir),
        judged=judged,
    )


def tell_apart(reports: Sequence[SpikeReport]) -> list[SpikeReport]:
    """The reports, in order, with labels that are equal only for the same curve."""
    keys = [report.curve.place or id(report.curve) for report in reports]
    curves: dict[Path | int, LossCurve] = {}
    for key, report in zip(keys, reports, strict=True):
        curves.setdefault(key, report.curve)
    distinct_labels = distinct([each.label for each in curves.values()], [str(each.path) for each in curves.values()])
    labels = dict(zip(curves, distinct_labels, strict=True))
    return [
        replace(report, curve=replace(report.curve, label=labels[key]))
        for key, report in zip(keys, reports, strict=True)
    ]


def across_runs(reports: Sequence[SpikeReport], reference: SpikeReport | None = None) -> dict[str, Any]:
    """Several runs together: pooled rates, shared and private events, tail gaps against `reference` (by default the
    first run). Rates per token use the runs whose tokens are known. Labels are made distinct.
    """
    reference = reference or reports[0]
    others = [number for number, report in enumerate(reports) if report is not reference]
    *reports, reference = tell_apart([*reports, reference])
    shared = shared_events([report.events for report in reports])
    totals = {name: sum(report.summary[name] for report in reports) for name in ("spikes", "steps", "tokens")}
    with_tokens = [report for report in reports if report.summary["tokens"]]
    gaps = {reports[number].curve.label: _gap(reports[number].curve, reference.curve) for number in others}
    return {
        "runs": [report.to_dict() for report in reports],
        "pooled": {
            **totals,
            "diverged": any(report.summary["diverged"] for report in reports),
            "diverged_runs": [report.curve.label for report in reports if report.summary["diverged"]],
            "per_1k_steps": _pooled([report for report in reports if report.judged], "steps", 1000),
            "runs_with_tokens": len(with_tokens),
            "per_billion_tokens": _pooled([report for report in with_tokens if report.judged], "tokens", BILLION),
        },
        "shared_by": _shared_by(reports),
        "shared": {
            report.curve.label: {
                "shared": [event.start_step for event, both in zip(report.events, flags, strict=True) if both],
                "private": [event.start_step for event, both in zip(report.events, flags, strict=True) if not both],
            }
            for report, flags in zip(reports, shared, strict=True)
        },
        "reference": reference.curve.label,
        "tail_gap": gaps,
    }


def _pooled(reports: Sequence[SpikeReport], exposure: str, unit: float) -> dict[str, float | None]:
    """The spikes of all `reports` per `unit` of the `exposure` in their summaries."""
    counts, exposures = ([report.summary[name] for report in reports] for name in ("spikes", exposure))
    return pooled_rate(counts, [steps / unit for steps in exposures])


def evidence_of(report: SpikeReport, number: int) -> tuple[SpikeEvent, dict[str, Any]]:
    """Event `number` (from 1, in order of steps) of a run, and the recorded evidence of its opening (may be empty).

    Raises ConfigError when there is no such event.
    """
    events = sorted([*report.events, *report.rewound], key=lambda event: event.start_step)
    if not events:
        raise ConfigError("this run has no events", field="--event", value=number)
    if not 1 <= number <= len(events):
        raise ConfigError("no such event", field="--event", value=number, allowed=between(1, len(events)))
    event = events[number - 1]
    kept = read_events(report.curve.run_dir) if report.curve.run_dir else []
    opened = [
        entry
        for entry in kept
        if entry["kind"] == "spike_opened"
        and entry["step"] == event.start_step
        # A rewound event and a surviving one may begin at the same step, but never with the same samples.
        and entry.get("samples_first", event.samples_first) == event.samples_first
    ]
    return event, opened[-1] if opened else {}


def lines_around(report: SpikeReport, event: SpikeEvent) -> list[dict[str, Any]]:
    """The recorded values of `AROUND` for the steps around the beginning of `event`; for a foreign curve, its own
    columns.
    """
    last = min(event.end_step, event.start_step + SHOWN - 1) + MARGIN
    if report.curve.run_dir is None:
        names = {"step": "step", "train/loss": "loss", "train/grad_norm": "grad_norm", "train/lr": "lr"}
        lines = [{key: getattr(point, name) for key, name in names.items()} for point in report.curve.points]
    else:
        file = report.curve.run_dir / METRICS_FILE
        lines = read_columns(report.curve.run_dir).lines(file, event.start_step - MARGIN, last)
        if event in report.rewound:
            undone = [line for line in read_discarded(report.curve.run_dir) if _is_of(line, event)]
            first = min(line["step"] for line in undone)
            lines = [line for line in lines if line["step"] < first] + undone
    return [
        {key: line[key] for key in AROUND if key in line}
        for line in lines
        if event.start_step - MARGIN <= line["step"] <= last
    ]


def _is_of(line: dict[str, Any], event: SpikeEvent) -> bool:
    """Whether a discarded line is part of `event` and was undone by a rewind."""
    inside = event.samples_first <= line.get("samples_first", -1) <= event.samples_last
    return inside and str(line["discarded_reason"]).startswith(UNDONE)


def _gap(curve: LossCurve, reference: LossCurve) -> dict[str, Any]:
    """The tail gap `at` equal tokens, or at equal steps where one of the two does not know its tokens."""
    at = "tokens" if curve.has_tokens and reference.has_tokens else "step"
    one, other = ([(getattr(point, at), point.loss) for point in each.points] for each in (curve, reference))
    found = tail_gap(one, other)
    return {**found, "gap": found["gap"] if found["points"] else None, "at": at}


def _shared_by(reports: Sequence[SpikeReport]) -> str:
    """How the events of these runs were matched: see `shared_events`."""
    knowing = sum(report.curve.has_samples for report in reports)
    if knowing == len(reports):
        return "samples"
    return "samples where both runs know them, else step" if knowing > 1 else "step"


def _observation(line: dict[str, Any]) -> Observation:
    return Observation(
        step=line["step"],
        loss=float(line["train/loss"]),
        grad_norm=float(line.get("train/grad_norm", math.nan)),
        tokens=line.get("tokens", 0),
        lr=line.get("train/lr", math.nan),
        samples_first=line.get("samples_first", -1),
        samples_last=line.get("samples_last", -1),
    )


def _undone_lines(curve: LossCurve) -> list[list[Observation]]:
    """The lines that each rewind undid, in the order of the rewinds."""
    undone: dict[tuple[int, str], list[Observation]] = {}
    for line in read_discarded(curve.run_dir) if curve.run_dir else ():
        if "train/loss" in line and line["discarded_reason"].startswith(UNDONE):
            key = (line["discarded_by_attempt"], line["discarded_reason"])
            undone.setdefault(key, []).append(_observation(line))
    return list(undone.values())


def _ended_diverged(run_dir: Path | None) -> bool:
    """Whether the last attempt of the run ended with exit code 5."""
    attempts = read_run(run_dir).get("attempts", []) if run_dir else []
    return bool(attempts) and attempts[-1]["state"] == "diverged"
