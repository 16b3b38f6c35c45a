"""`kha compare RUN...`: a table on the terminal and one HTML file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.report import PAGE, mark_of_page, page_in, write_report
from kha_train.analysis.table import print_comparison
from kha_train.cli.output import Overwrite, note, print_json
from kha_train.literal import say
from kha_train.operate.ahead import read_ahead
from kha_train.record.files import check_replaceable
from kha_train.record.finding import find_runs
from kha_train.telemetry.terminal import LiteralConsole


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs, sweeps, folders of runs; the first run's variant is the reference.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write index.html in.")] = Path("report"),
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Compare finished or living runs: what they reached, how they differ, and what that is worth.

    A page that this command made of the same runs is replaced; nothing else is."""
    ahead = read_ahead(find_runs(runs, lambda text: None, trained=True))
    read = cache(ahead.run)
    found = find_runs(runs, note, trained=True, read=read)
    check_replaceable(page_in(out), mark_of_page(found), "--out", overwrite, (PAGE.encode(),))
    comparison = compare_runs(found, read, ahead.summary)
    page = write_report(comparison, out)
    if as_json:
        print_json({**comparison.to_dict(), "report": str(page)}, indent=2)
        return
    print_comparison(comparison, LiteralConsole())
    say(f"report: {page}")
