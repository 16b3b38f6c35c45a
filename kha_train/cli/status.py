"""`kha status`: show the status of runs and sweeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kha_train.cli.output import note, print_json
from kha_train.config.build import nearest
from kha_train.errors import ConfigError, DataError, KhaError
from kha_train.operate.slurm import waiting_elements
from kha_train.operate.status import RunStatus, status_or_fault, unreadable
from kha_train.operate.sweep import queued_labels, sweep_points
from kha_train.record.finding import none_found, refuse_missing, runs_at, spelled_out
from kha_train.record.sweeps import load_sweep
from kha_train.telemetry.format import duration, fixed, scaled
from kha_train.telemetry.terminal import LiteralConsole, literal, table_console

COLORS = {
    "done": "green",
    "running": "cyan",
    "fatal": "red",
    "silent": "red",
    "unreadable": "red",
    "ended": "yellow",
    "requeue": "yellow",
}
COLUMNS: dict[str, Callable[[RunStatus], str | Text]] = {
    "run": lambda run: run.name,
    "state": lambda run: literal(run.state, COLORS.get(run.state, "default")),
    "step": lambda run: f"{run.step}/{run.steps or '?'}",
    "loss": lambda run: _or_dash(run.loss, lambda value: fixed(value, 3)),
    "tok/s": lambda run: _or_dash(run.tokens_per_second, scaled),
    "MFU": lambda run: _or_dash(run.mfu, lambda value: f"{value:.1%}"),
    "ETA": lambda run: _or_dash(None if run.state == "done" else run.seconds_left, duration),
    "spikes": lambda run: literal(f"{run.spikes}, diverged", "red") if run.diverged else str(run.spikes),
    "starts": lambda run: str(run.attempts),
    "goodput": lambda run: _or_dash(run.goodput, lambda value: f"{value:.0%}"),
    "saved": lambda run: _or_dash(run.checkpoint, str),
    "heard": lambda run: _or_dash(run.heartbeat, duration),
    "stepped": lambda run: _or_dash(run.idle, duration),
}
SORTED_BY: dict[str, Callable[[RunStatus], str | float | None]] = {
    "run": lambda run: run.name,
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "loss": lambda run: run.loss,
    "tok/s": lambda run: run.tokens_per_second,
    "MFU": lambda run: run.mfu,
    "ETA": lambda run: run.seconds_left,
    "spikes": lambda run: run.spikes,
    "starts": lambda run: run.attempts,
    "goodput": lambda run: run.goodput,
    "saved": lambda run: run.checkpoint,
    "heard": lambda run: run.heartbeat,
    "stepped": lambda run: run.idle,
}
"""The value that a column is sorted by; the columns of the table."""
SPARE = ("starts", "stepped", "heard", "MFU", "goodput", "spikes", "saved", "tok/s")
"""Columns that a narrow terminal leaves out, in this order."""


def status(
    paths: Annotated[list[Path], typer.Argument(help="Run directories, sweeps, or folders of runs.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh the table until every run is done or fatal, or until Ctrl-C.")
    ] = False,
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="Sort by a column of the table, such as loss; -loss: largest first.")
    ] = "",
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between refreshes with --watch.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show run status: state, step, loss, speed, time left, spikes, goodput, last checkpoint, heartbeat.

    A run with a damaged record is shown as unreadable; after all runs are shown, the command ends with its error.

    Raises ConfigError for --watch with --json, and for an unknown column.
    """
    ordered = _ordering(sort)
    if watch and as_json:
        raise ConfigError("cannot be used together", field="--watch, --json", fix="give one of the two")
    if not watch:
        runs, fault = _look(paths, note)
        runs = ordered(runs)
        if as_json:
            print_json({"runs": [run.to_dict() for run in runs]})
        else:
            _print(runs)
        if fault is not None:
            raise fault
        return
    console = LiteralConsole()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            runs, _ = _look(paths, lambda text: None)
            live.update(status_table(ordered(runs), console), refresh=True)
            if all(run.state in ("done", "fatal", "unreadable") for run in runs):
                return
            time.sleep(every)


def _ordering(sort: str) -> Callable[[list[RunStatus]], list[RunStatus]]:
    """Sorts runs by the column `sort` ("": leaves them as they are). Runs without a value come last. Raises ConfigError
    for an unknown column.
    """
    if not sort:
        return list
    name = {column.lower(): column for column in SORTED_BY}.get(sort.removeprefix("-").lower())
    if name is None:
        raise ConfigError("no such column", field="--sort", value=sort, **nearest(sort, SORTED_BY))
    value = SORTED_BY[name]

    def ordered(runs: list[RunStatus]) -> list[RunStatus]:
        known = [run for run in runs if value(run) is not None]
        known.sort(key=value, reverse=sort.startswith("-"))  # type: ignore[arg-type]  # no None among them
        return known + [run for run in runs if value(run) is None]

    return ordered


def status_table(runs: list[RunStatus], console: Console) -> Table:
    """One row per run, with as many columns as fit the width of `console`."""
    names, unlimited = list(COLUMNS), console.options.update(max_width=10_000)
    for spare in SPARE:
        if console.measure(_table(runs, names), options=unlimited).maximum <= console.width:
            break
        names.remove(spare)
    return _table(runs, names)


def _table(runs: list[RunStatus], names: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in ("run", "state") else "right", no_wrap=True)
    for run in runs:
        cells = (COLUMNS[name](run) for name in names)
        table.add_row(*(literal(cell) if isinstance(cell, str) else cell for cell in cells))
    return table


def _look(paths: list[Path], note: Callable[[str], None]) -> tuple[list[RunStatus], KhaError | OSError | None]:
    """The status of all runs, and the first error of those that cannot be read. `note` receives the paths that hold no
    run. Raises ConfigError when no path holds a run.
    """
    found: list[tuple[RunStatus, KhaError | OSError | None]] = []
    without: list[Path] = []
    places = spelled_out(paths)
    refuse_missing(places)
    for path in places:
        try:
            standing = _standing(path)
        except DataError as error:
            # Runs in its `sweep.json`, or in one below it. Anything else that was named has been shown.
            standing = [unreadable(path, path.name, error)]
        without += [] if standing else [path]
        found += standing
    if not found:
        raise none_found(paths)
    for path in without:
        note(f"skipped: {path}: no run here")
    return [run for run, _ in found], next((fault for _, fault in found if fault is not None), None)


def _standing(path: Path) -> list[tuple[RunStatus, KhaError | OSError | None]]:
    """The status of each point of the sweep `path`, or of the runs at or below it. Raises DataError for a damaged
    `sweep.json`, KhaError where SLURM does not answer.
    """
    sweep = load_sweep(path)
    if sweep is None:
        return [status_or_fault(run) for run in runs_at(path)]
    queued = queued_labels(sweep, waiting_elements() if sweep["submissions"] else ())
    return [status_or_fault(Path(point.run_dir), point.label, point.label in queued) for point in sweep_points(sweep)]


def _print(runs: list[RunStatus]) -> None:
    console = table_console()
    console.print(status_table(runs, console))
    for run in runs:
        if run.note:
            console.print(f"{run.name}: {run.note}")


def _or_dash(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)
