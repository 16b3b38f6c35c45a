"""A finished or live run as the comparison sees it, read from its directory alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kha_train.analysis.evaluations import Evaluations, read_evaluations
from kha_train.analysis.history import UNKNOWN, Stretch, history, shown, stretches_of
from kha_train.checkpoint.layout import FOLDER, step_name
from kha_train.checkpoint.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES
from kha_train.config.build import SEEDS, without_places
from kha_train.config.compose import load_plain
from kha_train.config.constants import FREE_TO_CHANGE, may_differ
from kha_train.errors import ConfigError
from kha_train.foreign.documents import Json
from kha_train.foreign.files import read_regular
from kha_train.record import Attempt, declared_in, read_attempts, read_discarded, read_events, read_run
from kha_train.record.columns import Columns
from kha_train.record.columns_twin import read_columns
from kha_train.record.labels import distinct

UNTOLD = ("run.dir", "run.name", "run.max_minutes", "resume.", "profile.", "telemetry.")
"""Settings, or sections, that a comparison leaves out, because they affect neither training nor any compared figure."""


class Forebear(NamedTuple):
    """A run whose steps led to another one: its id, the step at which the next one left it, and the SHA-256 of that
    checkpoint's manifest ("": unknown).
    """

    run_id: str
    left: float
    manifest: str = ""


@dataclass(frozen=True)
class RunData:
    """One run: metrics.jsonl as `columns` (never empty), run.json as `run`, and `stretches`, the attempts of its lines.

    `config` holds the settings of the last line by dotted keys, without the paths of its sources; if its attempt did
    not record them, those of config.yaml. `variant` is what is compared: `attention.name`, and other settings that
    distinguish runs with that attention, except the seed. `evaluations` are the figures of named validation sets and
    of tasks.
    """

    path: Path
    label: str
    config: dict[str, Any]
    run: dict[str, Any]
    columns: Columns
    stretches: tuple[Stretch, ...]
    discarded: int
    events: list[dict[str, Any]]
    variant: str
    evaluations: Evaluations = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """`run.seed` at the first step, which determines the initial values; None when the configuration has none."""
        seed: int | None = self.history("run.seed")[0][1]
        return seed

    @property
    def begun_after(self) -> int:
        """The step after which the curve begins: 0, or that of the checkpoint the run branched off."""
        return self.run["parent"]["step"] if self.run.get("parent") else 0

    @property
    def lineage(self) -> list[Forebear]:
        """The runs whose steps led here, itself at the end."""
        parent = self.run.get("parent")
        left = [*parent["ancestors"], (parent["run_id"], parent["step"], parent["manifest"])] if parent else []
        return [*(Forebear(*one) for one in left), Forebear(str(self.run.get("run_id", "")), math.inf)]

    def passes(self, step: int, manifest: str) -> bool:
        """Whether the curve is still the one on which the checkpoint of `step` with that manifest was saved."""
        saved = read_regular(self.path / FOLDER / step_name(step) / MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
        if saved is not None and manifest:
            return hashlib.sha256(saved).hexdigest() == manifest
        return not any(line["step"] == step for line in read_discarded(self.path))

    def history(self, key: str) -> list[tuple[int, Json]]:
        """(first step, value) of a setting, as far as recorded; if never recorded, its value in `config` from the first
        step on.
        """
        return history(self.stretches, key) or [(int(self.steps[0]), self.config.get(key))]

    def shown(self, key: str) -> Json:
        """A setting for display: its value or, where it changed during the run, its values in words."""
        return shown(self.history(key))

    @cached_property
    def steps(self) -> np.ndarray:
        """The step of every line, int64 [lines]."""
        return self.columns.steps

    def column(self, key: str) -> np.ndarray:
        """The metric `key`, one of `COLUMNS`, of every line, float64 [lines]; nan where a line lacks it."""
        return self.columns[key]

    def finite(self, key: str) -> np.ndarray:
        """The finite values of the metric `key`, in order."""
        values = self.column(key)
        finite: np.ndarray = values[np.isfinite(values)]
        return finite

    def meaning(self, key: str) -> str:
        """What the run declared the entry `key` of its record to mean; "" where it did not."""
        declared = declared_in(self.run)
        return declared[key].meaning if key in declared else ""

    def fact(self, key: str) -> Json:
        """A fact of the attempt that made the last line, by its dotted key; None when it was not recorded."""
        return self.stretches[-1].facts.get(key)


def load_run(path: Path, columns: Columns | None = None) -> RunData:
    """The run in directory `path`; `columns` are those of its record, if they have been read already.

    Raises ConfigError when it is missing, empty or not a run directory; DataError when a file in it is damaged.
    """
    if not path.is_dir():
        raise ConfigError("no such run directory", field="run", value=str(path), fix=_neighbours(path))
    columns = read_columns(path) if columns is None else columns
    if not len(columns):
        raise ConfigError(
            "no step was recorded here (metrics.jsonl is missing or empty)",
            field="run",
            value=str(path),
            fix="name the run.dir of a run that has trained at least one step",
        )
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(
            "this run directory has no config.yaml",
            field="run",
            value=str(path),
            fix="name the run.dir that `kha train` wrote",
        )
    saved, run = load_plain(config_file), read_run(path)
    stretches = stretches_of(columns, read_attempts(path) or _one_attempt(columns, saved, run))
    config = stretches[-1].settings or without_places(saved)
    config = {key: value for key, value in config.items() if value is not UNKNOWN}
    label = str(config.get("run.name") or path.resolve().name)
    attention = str(config.get("attention.name", "unknown"))
    discarded, events = len(read_discarded(path)), read_events(path)
    evaluations = read_evaluations(path, columns, stretches)
    return RunData(path, label, config, run, columns, stretches, discarded, events, attention, evaluations)


def load_runs(paths: list[Path], read: Callable[[Path], RunData] = load_run) -> tuple[RunData, ...]:
    """All runs, loaded by `read`, with distinct labels. Raises ConfigError when there is none or one is named twice."""
    if not paths:
        raise ConfigError("no run directory was given", field="runs", fix="kha compare RUN_DIR [RUN_DIR ...]")
    twice = {str(path) for path in paths if [other.resolve() for other in paths].count(path.resolve()) > 1}
    if twice:
        raise ConfigError("this run is named twice", field="runs", value=min(twice), fix="name every run once")
    runs = [read(path) for path in paths]
    named = distinct([run.label for run in runs], [str(run.path) for run in runs])
    return tuple(
        replace(run, label=label, variant=_variant(run, [other for other in runs if other.variant == run.variant]))
        for run, label in zip(runs, named, strict=True)
    )


def _one_attempt(columns: Columns, saved: dict[str, Any], run: dict[str, Any]) -> dict[int, Attempt]:
    """The attempts of a run whose run.json lists none: config.yaml belongs to the last line."""
    number = int(columns.whole("attempt", 1)[-1])
    return {number: Attempt(number, 0, None, run.get("provenance", {}), saved)}


def _variant(run: RunData, alike: list[RunData]) -> str:
    """The attention of `run`, and the settings in which it differs from runs `alike`, except those that change no
    result.
    """
    configs = [stretch.settings or other.config for other in alike for stretch in other.stretches]
    neutral = ("run.seed", *SEEDS, *FREE_TO_CHANGE)
    judged = sorted({key for config in configs for key in config if not may_differ(key, neutral, *configs)})
    differing = [key for key in judged if any(other.shown(key) != run.shown(key) for other in alike)]
    return " ".join([run.variant, *(f"{key}={run.shown(key)}" for key in differing)])


def _neighbours(path: Path) -> str:
    parent = path.resolve().parent
    runs = sorted(child.parent.name for child in parent.glob("*/metrics.jsonl")) if parent.is_dir() else []
    return f"runs found in {parent}: {', '.join(runs[:8])}" if runs else "check the path, or train the run first"
