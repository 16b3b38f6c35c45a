"""Trials of a study that are computations instead of training runs, one file of figures each.

They take the place of runs in `operate.study`: a trial is planned as a `Point`, whose `overrides` are the settings of
the computation, and `<study>/<label>/figures.json` says what it gave.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from kha_train.analysis.computation import Computation
from kha_train.analysis.kernel_pca.study import KernelPca
from kha_train.analysis.studies import ScaledStudy
from kha_train.analysis.study_outcomes import Outcome, machine_words, valued
from kha_train.config.build import build, flatten, nearest
from kha_train.errors import ConfigError
from kha_train.foreign.documents import parse_yaml
from kha_train.foreign.typed import Absent
from kha_train.operate.local import signals_interrupt
from kha_train.operate.sweep import Point
from kha_train.record.files import read_json, write_json
from kha_train.record.provenance import collect_provenance

COMPUTATIONS: Mapping[str, type[Computation]] = {"kernel_pca": KernelPca}
"""What `trials` of a study may name, beside `runs`."""
FIGURES_FILE = "figures.json"


class FiguresFile(TypedDict):
    """A computation that is done: its settings, what it gave, and where and when."""

    settings: list[str]
    figures: dict[str, float | None]
    began: float
    ended: float
    commit: str | None
    machine: str
    code_sha256: Annotated[str | None, Absent(None)]


def computed_points(
    scaled: ScaledStudy, directory: Path, settings: Sequence[Sequence[str]], labels: Sequence[str]
) -> list[Point]:
    """A point for every list of settings, each checked; writes nothing.

    Raises ConfigError for an unknown kind of trials, a figure that it does not give, and settings that it does not have
    or cannot compute.
    """
    kind, found = scaled.study.trials, []
    known = _class_of(kind).figures
    for measure in scaled.measures:
        if measure.entry not in known:
            raise ConfigError("no such figure", field="measures", value=measure.entry, **nearest(measure.entry, known))
    for own, label in zip(settings, labels, strict=True):
        computation = _computation(kind, own)
        work = computation.flops()
        found.append(Point(label, str(directory / label), tuple(own), computation.steps, 0, work))
    return found


def computed_outcome(point: Point, scaled: ScaledStudy) -> Outcome | None:
    """What the trial gave; None where it is not done.

    Raises ConfigError when its directory holds a trial of other settings, DataError when the file is damaged.
    """
    file = Path(point.run_dir) / FIGURES_FILE
    saved = read_json(file, FiguresFile)
    if saved is None:
        return None
    if saved["settings"] != list(point.overrides):
        changed = sorted({*saved["settings"]} ^ {*point.overrides})
        raise ConfigError(
            f"the directory holds another trial ({', '.join(changed)})",
            field="study",
            value=point.run_dir,
            fix="choose another --name for the changed study",
        )
    figures = saved["figures"]
    diverged = any(value is None or not math.isfinite(value) for value in figures.values())
    return Outcome(
        run_dir=point.run_dir,
        values={one.name: valued(one, figures.get(one.entry), diverged) for one in scaled.measures},
        diverged=diverged,
        seconds=saved["ended"] - saved["began"],
        commit=saved["commit"],
        data=None,
        began=saved["began"],
        ended=saved["ended"],
        machine=saved["machine"],
        code=saved["code_sha256"],
    )


def compute_points(
    kind: str, points: Sequence[Point], watch: Callable[[Sequence[Point], Sequence[Point]], None]
) -> None:
    """Compute one trial after another; `watch` is called as by `run_points`. A trial that is interrupted is lost, those
    before it stay. Raises KeyboardInterrupt on Ctrl-C, SIGTERM and SIGHUP.
    """
    origin = flatten(collect_provenance())
    commit = origin.get("git.commit")
    origin.pop("versions.torch", None)
    with signals_interrupt():
        for number, point in enumerate(points):
            watch([point], points[number + 1 :])
            began = time.time()
            figures = _computation(kind, point.overrides).measure()
            Path(point.run_dir).mkdir(parents=True, exist_ok=True)
            done = FiguresFile(
                settings=list(point.overrides),
                figures=dict(figures),
                began=began,
                ended=time.time(),
                commit=f"{commit} with changes" if commit and origin["git.dirty"] else commit,
                machine=machine_words(origin),
                code_sha256=origin["code_sha256"],
            )
            write_json(Path(point.run_dir) / FIGURES_FILE, {**done})


def needs_of(kind: str, point: Point) -> tuple[float, float]:
    """The seconds of a step, from a few that are timed now, and the GiB of the largest arrays."""
    computation = _computation(kind, point.overrides)
    return computation.seconds_a_step(), computation.memory() / 2**30


def _computation(kind: str, settings: Iterable[str]) -> Computation:
    # The last setting of a key counts, as in Hydra.
    values = {key: parse_yaml(value.encode()) for key, _, value in (text.partition("=") for text in settings)}
    found = build(_class_of(kind), values)
    problem = found.invalid()
    if problem:
        raise problem
    return found


def _class_of(kind: str) -> type[Computation]:
    if kind not in COMPUTATIONS:
        raise ConfigError("no such trials", field="trials", value=kind, **nearest(kind, ("runs", *COMPUTATIONS)))
    return COMPUTATIONS[kind]
