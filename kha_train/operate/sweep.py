"""A sweep: the points of a grid, each a run with its own stable directory. Finds which exist and which are missing.

`<sweep>/sweep.json` names the points and the jobs they were submitted in. `<sweep>/points-<n>.json` is what one job
array reads; configurations reach a shell in no other way. `<sweep>/<label>` is a point's run directory. Its name
depends on the point alone, never on its number or the clock, so the same command finds the same runs and submits only
the missing ones.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from kha_train.config.build import flatten, to_plain, without_places
from kha_train.config.compose import compose, expand, load_plain, quoted
from kha_train.config.constants import FREE_TO_CHANGE, may_differ
from kha_train.config.naming import old_name, tidy
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.estimate.counts import flops_per_token
from kha_train.operate.status import RunStatus, run_status
from kha_train.record.files import write_json
from kha_train.record.redact import REDACTED, Redactor
from kha_train.record.sweeps import FORMAT, SWEEP_FILE, load_sweep

SHORTHANDS = {"seed": "run.seed", "steps": "run.steps"}
TOLD_BY_NAME = ("attention", "run.seed")
"""Keys already in a point's label `<variant>-s<seed>`, unless `run.name` was given."""
SAFE_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,80}")
Equal = Literal["steps", "tokens", "flops"]


@dataclass(frozen=True)
class Point:
    """One run of a sweep. Its `overrides` are complete, including `run.dir`; the job passes them on unchanged."""

    label: str
    run_dir: str
    overrides: tuple[str, ...]
    steps: int
    tokens: int
    flops: float


def sweep_directory(parent: Path, name: str) -> Path:
    """`parent/name`. Raises ConfigError for a name that a scheduler or a file system might misread."""
    if not SAFE_NAME.fullmatch(name) or name.startswith((".", "-")):
        allowed = "up to 80 letters, digits and _.+-"
        raise ConfigError("is not a valid sweep name", field="--name", value=name, allowed=allowed)
    return parent / name


def plan_sweep(directory: Path, overrides: Sequence[str], equal: Equal = "steps") -> list[Point]:
    """The points of the grid `overrides` (`attention=gqa,kha_mlp seed=0,1`); see `plan_points`.

    Raises ConfigError for an override that does not parse, and as `plan_points` does.
    """
    return plan_points(directory, expand([_spelled_out(text) for text in overrides]), equal)


def checked_equal(text: str) -> Equal:
    """`text` if it is a valid value of --equal. Raises ConfigError otherwise."""
    choices = get_args(Equal)
    if text not in choices:
        raise ConfigError("cannot be made equal", field="--equal", value=text, allowed=", ".join(choices))
    equal: Equal = choices[choices.index(text)]
    return equal


def plan_points(
    directory: Path, points: Sequence[Sequence[str]], equal: Equal = "steps", labels: Sequence[str] | None = None
) -> list[Point]:
    """A `Point` for every list of overrides, each composed and validated; writes nothing.

    `labels` are the names of the points; without them, each is named after its settings. `equal` gives every point the
    optimiser steps, the tokens or the training FLOPs (interaction included) of the first point, by setting its
    `run.steps`. Raises ConfigError for a point that cannot run, sets its own `run.dir`, holds a secret, or occurs
    twice.
    """
    differing = _differing_keys(points)
    if equal != "steps" and "run.steps" in differing:
        raise ConfigError(f"is swept, but set by --equal {equal}", field="run.steps", fix="leave one of them out")
    made: list[Point] = []
    runs: list[dict[str, Any]] = []
    for number, overrides in enumerate(points):
        if any(_key(text) == "run.dir" for text in overrides):
            raise ConfigError(
                "is set for every point by the sweep", field="run.dir", fix="choose the sweep's directory with --dir"
            )
        config = compose([*overrides, f"run.name={quoted(labels[number])}"] if labels else overrides)
        runs.append(tidy(flatten(to_plain(config))) | ({"run.name": "", "run.dir": ""} if labels else {}))
        label = labels[number] if labels else _label_of(config, overrides, differing)
        steps = config.run.steps
        if made and equal != "steps":
            row_cost = config.model.seq_len * (1.0 if equal == "tokens" else flops_per_token(config).training)
            steps = config.data.batch_sizes.steps_for(
                (made[0].tokens if equal == "tokens" else made[0].flops) / row_cost
            )
        made.append(_point(directory, label, overrides, config, steps))
    refuse_secrets(text for point in made for text in (point.run_dir, *point.overrides))
    labels = [point.label for point in made]
    for number, label in enumerate(labels):
        # Different spellings of a value, such as 0 and 0.0, give the same run.
        if labels.count(label) > 1 or runs.index(runs[number]) < number:
            raise ConfigError("two points are the same run", field="sweep", value=label, fix="give every point once")
    return made


def refuse_secrets(settings: Iterable[str]) -> None:
    """Raises ConfigError for a setting or a directory with a secret: a sweep, or Hydra, writes both down and must pass
    them on unchanged.
    """
    redactor = Redactor.from_environment()
    for text in settings:
        if redactor.text(text) != text:
            raise ConfigError(
                "holds a secret, and what is set here is written into files and job scripts",
                field=_key(text) if "=" in text else "--dir",
                value=REDACTED,
                fix="give credentials by environment variables or a profile",
            )


def check_against_runs(points: Iterable[Point]) -> None:
    """Raises ConfigError when a point's directory holds a run of another configuration, which could not be resumed."""
    for point in points:
        found = load_plain(Path(point.run_dir) / "config.yaml")
        if not found:
            continue
        saved, now = without_places(found), without_places(to_plain(compose(point.overrides)))
        changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
        fixed = [
            f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
            for key in changed
            if not may_differ(key, FREE_TO_CHANGE, saved, now)
        ]
        if fixed:
            raise ConfigError(
                f"the directory holds another run ({'; '.join(fixed)})",
                field="run.dir",
                value=point.run_dir,
                fix="choose another --name for the changed sweep",
            )


def statuses(points: Iterable[Point], queued: Iterable[str] = ()) -> list[RunStatus]:
    """The status of every point; `queued` are the labels that SLURM holds a job for."""
    held = set(queued)
    return [run_status(Path(point.run_dir), point.label, point.label in held) for point in points]


def missing(points: Sequence[Point], standing: Sequence[RunStatus], retry_failed: bool = False) -> list[Point]:
    """The points to start: not done, running or queued; points that ended FATAL only with `retry_failed`."""
    leave = {"done", "running", "queued"} | (set() if retry_failed else {"fatal"})
    return [point for point, status in zip(points, standing, strict=True) if status.state not in leave]


def save_sweep(directory: Path, points: Sequence[Point], equal: Equal) -> dict[str, Any]:
    """Write (or extend) `sweep.json` and return its content. Raises DataError as `load_sweep`."""
    directory.mkdir(parents=True, exist_ok=True)
    new: dict[str, Any] = {"format": FORMAT, "created": time.time(), "points": [], "submissions": []}
    sweep = load_sweep(directory) or new
    known = {point["label"]: point for point in sweep["points"]} | {point.label: asdict(point) for point in points}
    sweep |= {"name": directory.name, "equal": equal, "points": list(known.values())}
    write_json(directory / SWEEP_FILE, sweep)
    return sweep


def sweep_points(sweep: Mapping[str, Any]) -> list[Point]:
    """The points of a loaded `sweep.json`."""
    names = [field.name for field in fields(Point)]
    return [
        Point(**{name: point[name] for name in names} | {"overrides": tuple(point["overrides"])})
        for point in sweep["points"]
    ]


def add_submission(directory: Path, job_id: str, points: Sequence[Point], command: Sequence[str]) -> None:
    """Record which points went into which job array, in the order of its elements."""
    sweep = load_sweep(directory)
    assert sweep is not None, "save_sweep comes first"
    labels = [point.label for point in points]
    sweep["submissions"].append({"job": job_id, "labels": labels, "time": time.time(), "command": list(command)})
    write_json(directory / SWEEP_FILE, sweep)


def queued_labels(sweep: Mapping[str, Any] | None, elements: Iterable[str]) -> set[str]:
    """The labels of array elements such as `41_0` that SLURM still holds."""
    held = set(elements)
    jobs = sweep["submissions"] if sweep else []
    return {label for job in jobs for i, label in enumerate(job["labels"]) if f"{job['job']}_{i}" in held}


def default_name(overrides: Sequence[str]) -> str:
    """A sweep's name from the keys it sweeps: `attention-seed`; `sweep` if there are none."""
    keys = sorted(_differing_keys(expand([_spelled_out(text) for text in overrides])))
    name = "-".join(key.rpartition(".")[2].rpartition("/")[2] for key in keys)
    return name if SAFE_NAME.fullmatch(name) else "sweep"


def _point(directory: Path, label: str, overrides: Sequence[str], config: RunConfig, steps: int) -> Point:
    run_dir = directory / label
    own = {"run.name": label, "run.dir": str(run_dir)}
    if not config.telemetry.wandb.group:
        own["telemetry.wandb.group"] = directory.name
    extra = [f"run.steps={steps}"] if steps != config.run.steps else []
    every = (*overrides, *extra, *(f"{key}={quoted(value)}" for key, value in own.items()))
    tokens = config.data.batch_sizes.total(1, steps) * config.model.seq_len
    return Point(label, str(run_dir), every, steps, tokens, tokens * float(flops_per_token(config).training))


def _label_of(config: RunConfig, overrides: Sequence[str], differing: set[str]) -> str:
    is_named = any(_key(text) == "run.name" for text in overrides)
    told = () if is_named else TOLD_BY_NAME
    swept = {_key(text): text.partition("=")[2] for text in overrides if _key(text) in differing.difference(told)}
    return _label(config.run.name if is_named else old_name(config), swept)


def _label(name: str, swept: Mapping[str, str]) -> str:
    """`<name>-<key><value>...`, shortened to a plain file name, with a digest if something was cut."""
    further = [f"{key.rpartition('.')[2]}{value}" for key, value in swept.items()]
    label = "-".join([name, *further])
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", label)[:60].lstrip(".-")
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _differing_keys(points: Sequence[Sequence[str]]) -> set[str]:
    # If a key is given twice the last one counts, as in Hydra.
    last = [{_key(text): text for text in overrides} for overrides in points]
    return {key for values in last for key in values if len({other.get(key) for other in last}) > 1}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _spelled_out(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{SHORTHANDS.get(key, key)}{equals}{value}"
