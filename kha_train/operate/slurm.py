"""Submits to SLURM: `kha sweep` and the Hydra launcher both call `submit`, which makes one job array for all points.

Options are passed as process arguments, never through a shell, so their values may hold any printable character.
Configurations are passed in a JSON file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

from kha_train.config.compose import compose, shipped
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError, KhaError, Options, either
from kha_train.operate.status import RunStatus
from kha_train.operate.sweep import (
    Equal,
    Point,
    add_submission,
    check_against_runs,
    missing,
    queued_labels,
    save_sweep,
    statuses,
)
from kha_train.record.files import read_json, write_json
from kha_train.record.redact import REDACTED, Redactor
from kha_train.record.sweeps import load_sweep

VALUE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
"""No control characters, no line breaks, nothing that UTF-8 cannot encode."""
OPTION = re.compile(r"[a-z][a-z-]*")
OURS = (
    "array", "nodes", "gpus-per-node", "job-name", "output", "error", "open-mode", "requeue", "no-requeue", "wrap",
    "parsable", "export",
)  # fmt: skip
"""Options that the sweep needs to set itself."""


@dataclass(frozen=True)
class JobOptions:
    """Where the points run. `parallel` limits the elements that run at the same time (0: no limit); `sbatch` holds
    further long options of sbatch by name; `site` is sourced before sbatch and inside the job; `python` runs the job.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    parallel: int = 0
    sbatch: Mapping[str, str] = field(default_factory=dict)
    site: str = ""
    python: str = sys.executable


def parse_sbatch(settings: Sequence[str]) -> dict[str, str]:
    """`["account=me", "time=1:00:00"]` as a dict. Raises ConfigError for anything that cannot be an option of
    sbatch.
    """
    options = {}
    for text in settings:
        name, _, value = text.partition("=")
        if not OPTION.fullmatch(name):
            raise ConfigError("is not a long option of sbatch", field="--sbatch", value=text, allowed="NAME=VALUE")
        if name in OURS:
            raise ConfigError("is set by the sweep itself", field="--sbatch", value=name)
        options[name] = value
    return options


def sbatch_command(directory: Path, points_file: Path, count: int, options: JobOptions) -> list[str]:
    """The arguments of the process that submits `count` points. Raises ConfigError for a value with line breaks."""
    limit = f"%{options.parallel}" if options.parallel else ""
    values = {
        "job-name": f"kha-{directory.name}",
        "array": f"0-{count - 1}{limit}",
        "nodes": str(options.nodes),
        # SLURM replaces patterns that start with a % sign.
        "output": f"{str(directory.resolve()).replace('%', '%%')}/logs/%A_%a.out",
        "export": "ALL",
    }
    values |= {"gpus-per-node": str(options.gpus_per_node)} if options.gpus_per_node else {}
    values |= dict(options.sbatch)
    for name, value in values.items():
        if value and not VALUE.fullmatch(value):
            problem = "holds a control character"
            raise ConfigError(problem, field=f"sbatch --{name}", value=value, allowed="printable text on one line")
        if Redactor.from_environment().clean({name: value})[name] != value:
            fix = "give credentials by environment variables or a profile"
            raise ConfigError("holds a secret", field=f"sbatch --{name}", value=REDACTED, fix=fix)
    flags = [f"--{name}={value}" if value else f"--{name}" for name, value in values.items()]
    sbatch = ["sbatch", "--parsable", *flags, str(shipped("launch") / "sweep.sbatch"), str(points_file.resolve())]
    if not options.site:
        return sbatch
    return [*_in_site(options, 'exec "$@"'), *sbatch]


def job_environment(options: JobOptions) -> dict[str, str]:
    """The variables that sbatch passes to the job beside the user's own environment."""
    added = {"KHA_LAUNCH": str(shipped("launch").resolve()), "KHA_PYTHON": options.python}
    return {**added, "KHA_SITE": str(Path(options.site).resolve())} if options.site else added


def _in_site(options: JobOptions, then: str) -> list[str]:
    """Bash that sources the site file as a job does, ends with 2 if that fails, and then runs `then`. The site file is
    shell code; its path and everything else are passed as arguments.
    """
    library, site = shipped("launch") / "lib.sh", Path(options.site).resolve()
    return ["bash", "-c", f'source "$1"; KHA_SITE=$2; shift 2; source_site; {then}', "site", str(library), str(site)]


def check_batches(points: Sequence[Point], options: JobOptions) -> None:
    """Raises ConfigError for a point whose batch cannot be divided among the ranks of its job.

    If only the node will know its number of ranks, there is at least one per node, so the batch must divide by the
    nodes.
    """
    per_node = _ranks_per_node(options)
    for point in points:
        config = compose(point.overrides)
        if per_node is None:
            alone = replace(config.engine, hpz_partition_size=1, expert_parallel=1, context_parallel=1)
            config = replace(config, engine=alone)
        validate_batch(config, options.nodes * (per_node or 1))


def _ranks_per_node(options: JobOptions) -> int | None:
    """As `ranks_per_node` of lib.sh: KHA_NPROC, else the GPUs; None where neither is known before the job starts."""
    told = os.environ.get("KHA_NPROC", "")
    if options.site:
        _check_site(options)
        ask = _in_site(options, 'printf "\\n%s" "${KHA_NPROC:-}"')
        asked = subprocess.run(ask, capture_output=True, text=True, check=False)
        if asked.returncode:
            raise ConfigError(f"fails: {asked.stderr.strip()}", field="--site", value=options.site)
        # The site file may print something first.
        told = asked.stdout.rpartition("\n")[2]
    if told and not (told.isascii() and told.isdecimal() and int(told)):
        raise ConfigError("is not a number of ranks", field="KHA_NPROC", value=told, allowed="integers from 1 on")
    return int(told) if told else options.gpus_per_node or None


def _check_site(options: JobOptions) -> None:
    """Raises ConfigError for a missing site file."""
    if options.site and not Path(options.site).is_file():
        raise ConfigError("no such file", field="--site", value=options.site, fix="copy launch/site/example.env")


def points_document(points: Sequence[Point]) -> dict[str, object]:
    """The file that one job array reads: the run directory and overrides of every element."""
    return {"points": [{"run_dir": point.run_dir, "overrides": list(point.overrides)} for point in points]}


class JobPoint(TypedDict):
    """What one element of a job array trains."""

    run_dir: str
    overrides: list[str]


class PointsFile(TypedDict):
    """The file that one job array reads."""

    points: list[JobPoint]


@dataclass(frozen=True)
class Started:
    """The result of a submission: the job array's id (None: nothing was missing), its points, and the status of every
    point.
    """

    job: str | None
    points: list[Point]
    before: list[RunStatus]


def start_missing(
    directory: Path, points: Sequence[Point], options: JobOptions, *, equal: Equal, retry_failed: bool
) -> Started:
    """Submit the points of a sweep that are neither done, running nor queued.

    Raises ConfigError for a point whose directory holds another run, and as `check_batches` and `submit` do.
    """
    check_against_runs(points)
    before = load_sweep(directory)
    elements = waiting_elements() if before and before["submissions"] else set()
    standing = statuses(points, queued_labels(before, elements))
    start = missing(points, standing, retry_failed)
    check_batches(start, options)
    save_sweep(directory, points, equal)
    return Started(submit(directory, start, options) if start else None, start, standing)


def submit(directory: Path, points: Sequence[Point], options: JobOptions) -> str:
    """Submit `points` of the sweep saved in `directory` as one job array; returns its job id.

    Raises ConfigError when sbatch is missing or an option is refused here; KhaError with sbatch's message when SLURM
    refuses or does not return a job id.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not installed here",
            field="kha sweep",
            fix=either(Options("--local", "{} to run the points here"), Options("--print", "{} to see them")),
        )
    _check_site(options)
    number = len(list(directory.glob("points-*.json")))
    points_file = directory / f"points-{number}.json"
    command = sbatch_command(directory, points_file, len(points), options)
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    write_json(points_file, points_document(points))
    environment = {**os.environ, **job_environment(options)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        points_file.unlink()
        said = " ".join(done.stderr.split()) or f"code {done.returncode}"
        raise KhaError(f"sbatch refused: {said}", field="kha sweep")
    # The site file or a plug-in may print something first.
    job_id = done.stdout.strip().rpartition("\n")[2].partition(";")[0]
    if not job_id.isdecimal():
        fix = "check with squeue; cancel the job before you submit again"
        raise KhaError(f"sbatch did not print a job id: {done.stdout.strip()!r}", field="kha sweep", fix=fix)
    add_submission(directory, job_id, points, command)
    return job_id


def waiting_elements() -> set[str]:
    """The elements of job arrays (`41_0`) that SLURM holds for this user, queued or running; empty without SLURM.

    Raises KhaError when SLURM exists but does not answer, because missing points cannot be determined then.
    """
    if shutil.which("squeue") is None:
        return set()
    command = ["squeue", "--noheader", "--array", "--me", "--format=%F_%K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KhaError(f"squeue does not answer: {' '.join(done.stderr.split())}", field="kha sweep", fix="try again")
    return set(done.stdout.split())


def read_point(points_file: Path, index: int) -> list[str]:
    """The run directory and the overrides of one element. Raises ConfigError when the file lacks it, DataError when the
    file is damaged.
    """
    points = (read_json(points_file, PointsFile) or {"points": []})["points"]
    if not 0 <= index < len(points):
        raise ConfigError(f"has {len(points)} points", field=str(points_file), value=index)
    return [points[index]["run_dir"], *points[index]["overrides"]]
