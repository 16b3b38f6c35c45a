"""`kha compare RUN...`: a table on the terminal, and a report as a page, as Markdown, and as pictures and numbers."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from kha_train.analysis.answer import answers
from kha_train.analysis.certify.certificate import VERIFIER, check_certificate, has_certificate, write_certificate
from kha_train.analysis.compare import Comparison, compare_runs
from kha_train.analysis.report.page import check_report, write_report
from kha_train.analysis.table import print_comparison
from kha_train.cli.output import Overwrite, note, print_json
from kha_train.cli.progress import progress_bar
from kha_train.errors import DataError
from kha_train.literal import say
from kha_train.operate.ahead import read_ahead
from kha_train.operate.certify import Request
from kha_train.operate.certify import certify as certify_runs
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
    certify: Annotated[
        bool, typer.Option("--certify", help="Write certificate.json and verify.py, which finds any later change.")
    ] = False,
    null: Annotated[
        list[Path] | None,
        typer.Option(help="Certify, and measure differences that mean nothing on these A/A runs (once for each)."),
    ] = None,
    effect: Annotated[
        float | None, typer.Option(help="Certify, and report how many seeds show such a difference (nats per token).")
    ] = None,
    replay: Annotated[
        int, typer.Option(help="Certify, and compute N random stretches between checkpoints again.", min=0)
    ] = 0,
    replay_seed: Annotated[int, typer.Option(help="The seed that draws the stretches.")] = 0,
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
    request = Request(tuple(find_runs(null, note, trained=True)) if null else (), effect, replay, replay_seed)
    certify = certify or request != Request(replay_seed=replay_seed)
    if certify:
        check_certificate(out, found, "--out", overwrite)
        comparison = replace(comparison, certified=certify_runs(comparison, request, read, note, progress_bar))
    with written_as("--out", out, "choose a writable directory: --out DIRECTORY"):
        page = write_report(comparison, out)
        seal = write_certificate(comparison, out) if certify else ""
    if not certify and has_certificate(out):
        note("the certificate beside the report is of an earlier one: --certify makes a new one")
    _print(comparison, page, seal, as_json)
    if fault is not None:
        raise fault


def _print(comparison: Comparison, page: Path, seal: str, as_json: bool) -> None:
    """Print the comparison, and where its report and the seal of its certificate ("": none) are to be found."""
    if as_json:
        told = {"answer": list(answers(comparison)), "report": str(page), **({"seal": seal} if seal else {})}
        print_json(comparison.to_dict() | told, indent=2)
        return
    print_comparison(comparison, LiteralConsole())
    say(f"report: {page}")
    if seal:
        say(f"seal of the certificate, to be kept elsewhere: {seal}")
        say(f"to check it: python {shlex.quote(str(page.with_name(VERIFIER)))}")


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
