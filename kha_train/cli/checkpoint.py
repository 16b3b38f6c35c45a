"""`kha checkpoint list|verify|prune|keep|diff|merge`: list, check, delete and average the checkpoints of a run."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kha_train.checkpoint.layout import FOLDER
from kha_train.checkpoint.loss import lost_checkpoints
from kha_train.cli.output import print_json
from kha_train.cli.progress import progress_bar
from kha_train.config.first_steps import quickstart_first
from kha_train.errors import CheckpointError, ConfigError, Look
from kha_train.literal import say
from kha_train.record.finding import find_run
from kha_train.record.lock import RunLock
from kha_train.telemetry.terminal import LiteralConsole

app = typer.Typer(name="checkpoint", help="Inspect and manage a run's checkpoints.", no_args_is_help=True)
RunDir = Annotated[Path, typer.Argument(help="A run directory, or a folder that holds one run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_(run: RunDir, as_json: AsJson = False) -> None:
    """List steps, sizes, ages and marks, newest first. Reports damage that shows without reading every byte."""
    from kha_train.checkpoint.inventory import inventory

    rows = inventory(_folder(find_run(run)))
    if as_json:
        print_json([row.to_dict() for row in rows], indent=2)
        return
    table = Table("step", "size", "saved", "ranks", "kept", "state")
    for row in rows:
        table.add_row(str(row.step), f"{row.bytes / 2**20:,.1f} MiB", row.saved, str(row.ranks), row.kept, row.state)
    LiteralConsole().print(table)


@app.command("verify")
def verify_(
    path: Annotated[Path, typer.Argument(help="A run directory (all its checkpoints) or one step directory.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte and compare it with its manifest. Raises CheckpointError (exit 4) when a checkpoint fails."""
    from kha_train.checkpoint.inventory import inventory
    from kha_train.checkpoint.reader import verify

    path = find_run(path)
    _check_not_lost(path)
    rows = inventory(path / FOLDER) if (path / FOLDER).is_dir() else []
    directories = [row.path for row in rows] or [path]
    problems: dict[str, str] = {}
    for directory in directories:
        try:
            verify(directory)
        except CheckpointError as error:
            problems[directory.name] = str(error)
        if not as_json:
            say(f"{directory.name}: {problems.get(directory.name, 'whole')}")
    if as_json:
        print_json({directory.name: problems.get(directory.name) for directory in directories}, indent=2)
    if problems:
        raise CheckpointError(f"{len(problems)} of {len(directories)} do not verify", field=str(path))


@app.command("prune")
def prune_(
    run: RunDir,
    keep_last: Annotated[int, typer.Option(help="Keep this many of the newest.")] = 2,
    keep_every: Annotated[int, typer.Option(help="Keep every checkpoint at a multiple of this step (0: none).")] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only list what would be deleted.")] = False,
) -> None:
    """Delete old checkpoints of a run that is not training. Marked ones and the newest valid one are always kept."""
    from kha_train.checkpoint.reader import verify
    from kha_train.checkpoint.retention import Keep, prune

    run = find_run(run)
    _folder(run)
    with ExitStack() as held:
        if yes:
            # A live run holds its rewind points in memory, so nothing may be deleted under it.
            held.callback(RunLock(run).close)
        gone = prune(run, Keep(keep_last, keep_every), check=verify, dry_run=not yes)
    verb = "deleted" if yes else "would delete (pass --yes to delete)"
    say(f"{verb}: {', '.join(f'step {step}' for step in gone) or 'nothing'}")


@app.command("keep")
def keep_(
    run: RunDir,
    step: Annotated[int, typer.Argument(help="The step of a checkpoint.")],
    off: Annotated[bool, typer.Option("--off", help="Remove the mark.")] = False,
) -> None:
    """Mark a checkpoint so that nothing deletes it. Raises ConfigError for a step without a checkpoint."""
    from kha_train.checkpoint.inventory import inventory
    from kha_train.checkpoint.retention import mark

    run = find_run(run)
    folder = _folder(run)
    if step not in {row.step for row in inventory(folder)}:
        raise ConfigError(
            "no such checkpoint",
            field="step",
            value=step,
            fix=Look(shlex.join(["kha", "checkpoint", "list", str(run)])),
        )
    mark(folder, step, keep=not off)
    say(f"step {step}: {'no longer marked' if off else 'marked'}")


@app.command("diff")
def diff_(
    first: Annotated[Path, typer.Argument(help="A step directory, or a run directory (its newest checkpoint).")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Show differences in settings, progress, parameters, moments and buffers; layouts are not compared."""
    from kha_train.checkpoint.compare import compare
    from kha_train.checkpoint.reader import open_verified
    from kha_train.distributed import World

    world = World.single()
    found = compare(open_verified(find_run(first), world), open_verified(find_run(second), world))
    if as_json:
        print_json(found.to_dict(), indent=2)
        return
    if found.equal:
        say("equal: every setting, count, master, moment and buffer is bit-identical")
        return
    _print_rows("setting", ("first", "second"), found.settings)
    _print_rows("tensor", ("largest difference", "relative norm"), found.tensors)
    for name in found.only_first:
        say(f"only in the first: {name}")
    for name in found.only_second:
        say(f"only in the second: {name}")


@app.command("merge")
def merge_(
    sources: Annotated[list[Path], typer.Argument(help="Step directories, or run directories (see --last).")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    weights: Annotated[str, typer.Option(help="A weight for each checkpoint, as 1,2,1; empty: all alike.")] = "",
    last: Annotated[int, typer.Option(min=1, help="Of each run directory, take this many of its newest.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Average the weights of checkpoints of one model into a new run, which `run.init_from` and generation take."""
    from kha_train.checkpoint.merge import merge, sources_of

    found = sources_of([find_run(source) for source in sources], last)
    with progress_bar("averaging", None) as advance:
        made = merge(found, _weights(weights), out, advance)
    if as_json:
        print_json(made.to_plain(), indent=2)
        return
    for source, share in zip(made.sources, made.weights, strict=True):
        say(f"{share:8.4f}  step {source['step']}  {source['checkpoint']}")
    say(f"{made.parameters:,} parameters averaged into {made.checkpoint}")


def _weights(text: str) -> list[float]:
    """Raises ConfigError for anything but numbers between commas."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError("not numbers", field="--weights", value=text, allowed="as 1,2,1") from None


def _print_rows(title: str, columns: tuple[str, str], rows: dict[str, tuple[Any, Any]]) -> None:
    if rows:
        table = Table(title, *columns)
        for name, (left, right) in rows.items():
            table.add_row(name, str(left), str(right))
        LiteralConsole().print(table)


def _folder(run: Path) -> Path:
    """The checkpoint folder of a run. Raises ConfigError when it has saved none, CheckpointError when they are lost."""
    _check_not_lost(run)
    folder = run / FOLDER
    if not folder.is_dir():
        raise ConfigError("holds no checkpoints", field="RUN", value=str(run), fix=quickstart_first(run))
    return folder


def _check_not_lost(run: Path) -> None:
    """Raises CheckpointError when the run has saved checkpoints that no longer exist."""
    if problem := lost_checkpoints(run):
        raise CheckpointError(problem, field="RUN", value=str(run), fix=f"mount or restore {run / FOLDER}")
