"""`kha spikes`: the loss spikes of a run, of a file, of several runs together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kha_train.analysis.spikes import SpikeReport, across_runs, evidence_of, read_curve, score_curve
from kha_train.analysis.spikes_plot import plot_spikes
from kha_train.analysis.spikes_text import batch_texts
from kha_train.errors import KhaError

EVENT_COLUMNS = ("start_step", "class", "width", "height", "area", "gnorm_peak_ratio", "recovered", "samples_first")
TEXT_CHARACTERS = 600
"""Shown of each row; `--json` gives all of it."""


def spikes(
    curves: Annotated[list[Path], typer.Argument(help="Run directories, metrics.jsonl, or CSV step,loss[,grad_norm].")],
    event: Annotated[int | None, typer.Option(help="Show event number K: evidence, and text of its batch.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve with its events shaded: .png, .svg, .pdf.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Run that tail gaps are measured against.")] = None,
    planned: Annotated[list[int] | None, typer.Option(help="A step at which a jump was meant (repeatable).")] = None,
    rewound: Annotated[bool, typer.Option(help="Count events that a rewind undid.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Score curves for loss spikes: events, rates with intervals, published scores; several runs also together."""
    reports = [score_curve(read_curve(path, planned or ()), rewound) for path in curves]
    if plot is not None:
        plot_spikes(reports[0], plot)
    if event is not None:
        answer = _event(reports[0], event)
    elif len(reports) == 1 and reference is None:
        answer = reports[0].to_dict()
    else:
        answer = across_runs(reports, score_curve(read_curve(reference), rewound) if reference else None)
    if as_json:
        typer.echo(json.dumps(_plain(answer), indent=2, allow_nan=False))
        return
    console = Console()
    if event is not None:
        console.print_json(json.dumps(_plain({key: value for key, value in answer.items() if key != "texts"})))
        for text in answer["texts"]:
            console.print(f"--- sample {text['sample']} of {text['source']}", markup=False)
            console.print(text["text"][:TEXT_CHARACTERS], markup=False, highlight=False)
        return
    for report in reports:
        _print_report(report, console)
    if "pooled" in answer:
        _print_together(answer, console)
    if plot is not None:
        console.print(f"plot: {plot}", markup=False)


def _event(report: SpikeReport, number: int) -> dict[str, Any]:
    """One event, the evidence the record kept of its first step, and the text of that step's batch."""
    event, opened = evidence_of(report, number)
    answer: dict[str, Any] = {"event": event.to_dict(), "opened": opened, "texts": []}
    if report.curve.run_dir and event.samples_first >= 0:
        try:
            answer["texts"] = batch_texts(report.curve.run_dir, event.samples_first)
        except KhaError as error:
            answer["no_texts"] = str(error)
    return answer


def _print_report(report: SpikeReport, console: Console) -> None:
    summary = report.summary
    table = Table("#", *EVENT_COLUMNS, title=report.curve.label, title_justify="left")
    events = sorted([*report.events, *report.rewound], key=lambda event: event.start_step)
    for number, event in enumerate(events, start=1):
        fields = event.to_dict()
        mark = " (rewound)" if event in report.rewound else ""
        table.add_row(f"{number}{mark}", *(_short(fields[name]) for name in EVENT_COLUMNS))
    console.print(table if events else f"{report.curve.label}: no event")
    for name, value in summary.items():
        if name != "rates":
            console.print(f"  {name:<22} {_short(value)}", highlight=False)
    for name, value in summary["rates"].items():
        console.print(f"  {name:<28} {_interval(value)}", highlight=False)
    for name, value in {**report.scores, **report.actions}.items():
        console.print(f"  {name:<28} {_short(value)}", highlight=False)
    if report.curve.repeated:
        console.print(f"  {report.curve.repeated} repeated steps: the last line of each was taken")


def _print_together(answer: dict[str, Any], console: Console) -> None:
    pooled = answer["pooled"]
    console.print(f"together: {pooled['spikes']} spikes, per 1k steps {_interval(pooled['per_1k_steps'])}")
    for label, events in answer["shared"].items():
        console.print(
            f"  {label}: shared with another run {events['shared']}, private {events['private']} "
            f"(at the same {answer['shared_by']})",
            markup=False,
        )
    for label, gap in answer["tail_gap"].items():
        console.print(
            f"  {label}: tail gap to {answer['reference']} {_short(gap['gap'])} nats "
            f"({gap['points']} points, at equal {gap['at']})"
        )


def _interval(value: dict[str, float]) -> str:
    return f"{_short(value['value'])} (95 % {_short(value['low'])} to {_short(value['high'])})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null and words."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
