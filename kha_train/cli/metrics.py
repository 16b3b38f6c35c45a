"""`kha metrics`: the meaning of the numbers in a run's record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kha_train.cli.output import print_json
from kha_train.cli.train import Overrides
from kha_train.config.compose import compose
from kha_train.errors import ConfigError
from kha_train.metric import Metric
from kha_train.record import declared_in, read_run
from kha_train.record.finding import find_run
from kha_train.telemetry.terminal import LiteralConsole


def metrics(
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="List the metrics that this run declared.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the metrics that a run with these settings records, each with unit and meaning.

    Raises ConfigError when the run does not exist, and DataError when its record is damaged.
    """
    found = _declared(overrides or []) if run is None else _recorded(run)
    if as_json:
        print_json({name: metric.to_plain() for name, metric in found.items()}, indent=2)
        return
    table = Table("metric", "unit", "meaning")
    for name, metric in found.items():
        table.add_row(name, metric.unit, metric.meaning + (" (timing)" if metric.timing else ""))
    LiteralConsole(width=160).print(table)


def _declared(overrides: list[str]) -> dict[str, Metric]:
    """Build the model without memory, and collect what it declares."""
    config = compose(overrides)
    from kha_train.train.metrics import declared

    return declared(config)


def _recorded(path: Path) -> dict[str, Metric]:
    """For a run of an older release, which declared nothing: the names it recorded, without meanings."""
    run = read_run(find_run(path))
    if not run:
        raise ConfigError("is not a run", field="--run", value=str(path), fix="name the directory of a run")
    return declared_in(run)
