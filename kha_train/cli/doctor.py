"""`kha doctor`: what this machine can run, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from kha_train.cli.output import print_json
from kha_train.cli.train import Overrides
from kha_train.config.compose import compose
from kha_train.telemetry.terminal import LiteralConsole, literal, table_console

if TYPE_CHECKING:
    from kha_train.operate.doctor.checks import Check

COLORS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


def doctor(
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine for a run with these settings: versions, CPU and GPU, kernels, communication, disk, limits,
    SLURM, W&B, variables. Each line is OK, WARN or FAIL with its fix. Ends with 2 if any line is FAIL.
    """
    # `kha --help` does not wait for the packages that it asks.
    from kha_train.operate.doctor import examine

    checks = list(examine(compose(overrides or [])))
    counts = {state: sum(check.state == state for check in checks) for state in COLORS}
    if as_json:
        print_json({"ok": not counts["FAIL"], "counts": counts, "checks": [check.to_dict() for check in checks]})
    else:
        _show(checks)
        LiteralConsole().print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["FAIL"]:
        raise typer.Exit(2)


def _show(checks: list[Check]) -> None:
    table = Table(Column("", no_wrap=True), "topic", "what", Column("found", overflow="fold"), box=None, pad_edge=False)
    for check in checks:
        fix = f"\nfix: {check.fix}" if check.fix else ""
        table.add_row(
            literal(check.state, COLORS[check.state]), check.topic, check.name, literal(f"{check.found}{fix}")
        )
    table_console().print(table)
