"""`kha sweep`: a grid of runs. `kha launch-arguments`: the arguments of one job, for the batch scripts."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from kha_train.cli.output import print_json
from kha_train.cli.status import status_table
from kha_train.cli.train import Overrides
from kha_train.config.compose import compose, compose_at_home, shipped
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import KhaError
from kha_train.literal import say
from kha_train.operate import slurm, sweep
from kha_train.operate.local import run_points
from kha_train.operate.slurm import JobOptions, Started
from kha_train.operate.sweep import Point
from kha_train.output import harmless_output
from kha_train.record import first_failure_line
from kha_train.record.streams import RedactedStream
from kha_train.telemetry.terminal import LiteralConsole

Grid = Annotated[
    list[str],
    typer.Argument(help="Settings; commas make a grid: attention=gqa,kha_linear seed=0,1,2", metavar="KEY=VALUE[,..]"),
]
Local = Annotated[bool, typer.Option("--local", help="Train here instead of submitting to SLURM.")]
Processes = Annotated[int, typer.Option(min=1, help="Ranks per run with --local.")]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes per run.")]
GpusPerNode = Annotated[int, typer.Option(min=0, help="GPUs per node; 0: the site's default.")]
Parallel = Annotated[int, typer.Option(min=0, help="Runs that are trained at the same time; 0: no limit on SLURM.")]
Sbatch = Annotated[list[str] | None, typer.Option(help="Further options for sbatch: account=me, time=4:00:00")]
Site = Annotated[str, typer.Option(help="Site file, see launch/site/example.env.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Also restart runs that ended FATAL.")]


def sweep_command(
    overrides: Grid,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; default: the swept keys.")] = None,
    parent: Annotated[Path, typer.Option("--dir", help="Parent of the sweep's directory NAME.")] = Path("runs"),
    equal: Annotated[str, typer.Option(help="What all points have in common: steps, tokens or flops.")] = "steps",
    local: Local = False,
    processes: Processes = 1,
    show: Annotated[bool, typer.Option("--print", help="Show points, command and scripts; write nothing.")] = False,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 0,
    parallel: Parallel = 0,
    sbatch: Sbatch = None,
    site: Site = "",
    retry_failed: RetryFailed = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a grid of variants: all points are validated, then submitted as one job array. The same command again
    starts only missing points.
    """
    directory = sweep.sweep_directory(parent, sweep.default_name(overrides) if name is None else name)
    common = sweep.checked_equal(equal)
    points = sweep.plan_sweep(directory, overrides, common)
    options = JobOptions(nodes, gpus_per_node, parallel, slurm.parse_sbatch(sbatch or []), site)
    if show:
        slurm.check_batches(points, options)
        _show(directory, points, options, as_json)
        return
    if local:
        started = _run_here(directory, points, common, processes, parallel, retry_failed, quiet=as_json)
    else:
        started = slurm.start_missing(directory, points, options, equal=common, retry_failed=retry_failed)
    lacking = _lacking(points, started, local)
    _answer(directory, points, started, lacking, as_json)
    if lacking:
        _refuse_as_whole(directory, points, lacking)


def launch_arguments(
    overrides: Overrides = None,
    points: Annotated[Path | None, typer.Option(help="points-N.json of a sweep.")] = None,
    index: Annotated[int, typer.Option(help="Index in the job array.")] = 0,
) -> None:
    """Print the run directory and the overrides of a job, each followed by a NUL byte, after validating them."""
    if points is not None:
        run_dir, *overrides = slurm.read_point(points, index)
        compose(overrides)
    else:
        overrides = overrides or []
        run_dir = compose_at_home(overrides).run.dir
    # A script reads these, so they are printed without redaction.
    out = sys.stdout.behind if isinstance(sys.stdout, RedactedStream) else sys.stdout
    out.write("".join(f"{text}\0" for text in (run_dir, *overrides)))


def _show(directory: Path, points: list[Point], options: JobOptions, as_json: bool) -> None:
    """What would be submitted: the points, the command with its environment and, as text, the scripts too."""
    command = slurm.sbatch_command(directory, directory / "points-0.json", len(points), options)
    environment = slurm.job_environment(options)
    if as_json:
        print_json({"points": slurm.points_document(points), "command": command, "environment": environment})
        return
    settings = shlex.join(f"{name}={value}" for name, value in environment.items())
    say(f"# {len(points)} points: {', '.join(point.label for point in points)}")
    say(f"# command\nenv {settings} {shlex.join(command)}\n")
    say(f"# {directory}/points-0.json\n{json.dumps(slurm.points_document(points), indent=2)}")
    for script in ("sweep.sbatch", "lib.sh"):
        say(f"\n# {script}\n{(shipped('launch') / script).read_text(encoding='utf-8')}")


def _run_here(
    directory: Path,
    points: list[Point],
    equal: sweep.Equal,
    processes: int,
    parallel: int,
    retry_failed: bool,
    quiet: bool,
) -> Started:
    """Train the missing points, `parallel` at a time (0: one). A failed point does not stop the others."""
    sweep.check_against_runs(points)
    standing = sweep.statuses(points)
    start = sweep.missing(points, standing, retry_failed)
    for point in start:
        validate_batch(compose(point.overrides), processes)
    sweep.save_sweep(directory, points, equal)
    console = LiteralConsole(stderr=True)
    # The table only mirrors the record: if it cannot be printed, the runs are trained all the same.
    with harmless_output(), Live(console=console, auto_refresh=False) as live:

        def show(training: Sequence[Point], waiting: Sequence[Point]) -> None:
            if console.is_terminal and not quiet:
                live.update(status_table(sweep.statuses(points), console), refresh=True)

        run_points(directory, start, processes, show, max(1, parallel))
    return Started(None, start, standing)


def _lacking(points: list[Point], started: Started, local: bool) -> dict[str, str]:
    """Points that have no result after this command and are neither training nor queued: label -> state."""
    now = sweep.statuses(points) if local else started.before
    begun = set() if local else {point.label for point in started.points}
    states = {status.name: status.state for status in now if status.name not in begun}
    return {label: state for label, state in states.items() if state not in ("done", "running", "queued")}


def _refuse_as_whole(directory: Path, points: list[Point], lacking: dict[str, str]) -> None:
    """Raises KhaError that names the `lacking` points and why each has no result."""
    told = {point.label: first_failure_line(Path(point.run_dir)) for point in points if point.label in lacking}
    labels = ", ".join(f"{label} ({line or lacking[label]})" for label, line in told.items())
    fix = f"see {directory}/logs; the same command continues"
    fix += "; add --retry-failed for fatal points" if "fatal" in lacking.values() else ""
    raise KhaError(f"{len(lacking)} of {len(points)} points are missing: {labels}", field="kha sweep", fix=fix)


def _answer(directory: Path, points: list[Point], started: Started, lacking: dict[str, str], as_json: bool) -> None:
    labels = [point.label for point in started.points]
    left = {status.name: status.state for status in started.before if status.name not in labels}
    if as_json:
        runs = [{"label": point.label, "run_dir": point.run_dir, "steps": point.steps} for point in points]
        answer = {"directory": str(directory), "job": started.job, "started": labels, "left": left, "missing": lacking}
        print_json({**answer, "points": runs})
        return
    for label, state in left.items():
        say(f"left as it is: {label} ({state})")
    if started.job:
        say(f"submitted {len(labels)} points as job {started.job}")
    say(f"watch:   kha status --watch {directory}")
    say(f"compare: kha compare {shlex.join(point.run_dir for point in points)}")
