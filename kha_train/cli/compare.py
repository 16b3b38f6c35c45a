"""`kha compare RUN...`: a table on the terminal, and a report as a page, as Markdown, and as pictures and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from kha_train.analysis.answer import answers
from kha_train.analysis.compare import compare_runs
from kha_train.analysis.report.page import check_report, write_report
from kha_train.analysis.table import print_comparison
from kha_train.cli.output import Overwrite, note, print_json
from kha_train.errors import DataError
from kha_train.literal import say
from kha_train.operate.ahead import read_ahead
from kha_train.record.files import written_as
from kha_train.record.finding import find_runs
from kha_train.telemetry.terminal import LiteralConsole


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs, sweeps or folders of runs; the variant of the first run is the reference."),
    ],
    out: Annotated[Path, typer.Option(help="Directory for index.html, report.md and figures/.")] = Path("report"),
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare finished or live runs: results, differences, and how strong the evidence is.

    A page that this command made of the same runs is replaced; any other file is kept. A damaged run beside two or more
    whole ones is skipped: the others are compared, and the command ends with its error.
    """
    ahead = read_ahead(find_runs(runs, lambda text: None, trained=True))
    read = cache(ahead.run)
    passed_over: list[str] = []

    def tell(text: str) -> None:
        passed_over.append(text.removeprefix("skipped: "))
        note(text)

    found, fault = _whole(find_runs(runs, tell, trained=True, read=read), read, tell)
    check_report(out, found, "--out", overwrite)
    comparison = replace(compare_runs(found, read, ahead.summary), passed_over=tuple(passed_over))
    with written_as("--out", out, "choose a writable directory: --out DIRECTORY"):
        page = write_report(comparison, out)
    if as_json:
        print_json({**comparison.to_dict(), "answer": list(answers(comparison)), "report": str(page)}, indent=2)
    else:
        print_comparison(comparison, LiteralConsole())
        say(f"report: {page}")
    if fault is not None:
        raise fault


def _whole(
    found: list[Path], read: Callable[[Path], object], tell: Callable[[str], None]
) -> tuple[list[Path], DataError | None]:
    """The undamaged runs of `found`, and the first fault of the others; `tell` receives each fault. With fewer than two
    undamaged runs there is nothing to compare, so all are returned and the comparison raises the error.
    """
    faults: dict[Path, DataError] = {}
    for run in found:
        try:
            read(run)
        except DataError as error:
            faults[run] = error
    whole = [run for run in found if run not in faults]
    if len(whole) < 2:
        return found, None
    for run, found_fault in faults.items():
        tell(f"skipped: {run}: {found_fault}")
    return whole, next(iter(faults.values()), None)
