"""`kha spikes`: loss spikes of a run, a curve file, or several runs together."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kha_train.analysis.spikes import (
    SpikeReport,
    across_runs,
    evidence_of,
    lines_around,
    read_curve,
    read_curves,
    score_curve,
    tell_apart,
)
from kha_train.analysis.spikes_plot import mark_of_plot, plot_spikes
from kha_train.analysis.spikes_text import batch_texts
from kha_train.cli.output import Overwrite, note, print_json
from kha_train.errors import ConfigError, KhaError
from kha_train.record.files import check_replaceable
from kha_train.record.finding import find_run, find_runs
from kha_train.telemetry.terminal import LiteralConsole

EVENT_COLUMNS = {
    "step": "start_step", "class": "class", "width": "width", "height": "height", "area": "area",
    "norm x": "gnorm_peak_ratio", "recovered": "recovered", "sample": "samples_first",
}  # fmt: skip
"""Column heading -> field of an event."""
AROUND_COLUMNS = {
    "step": "step", "train/loss": "loss", "spike/z": "z", "train/grad_norm": "norm", "train/lr": "lr",
    "train/skipped": "skip", "moe/maxvio": "load", "attn/max_logit": "logit", "kha/from_identity": "kha",
}  # fmt: skip
"""Metric of a step -> column heading."""
ENDINGS = {"unrecovered": "not recovered", "open": "still open at the end"}
"""Class of an event that did not recover -> how the report describes it."""
LAYER_COLUMNS = ("norm", "logit", "load", "busiest", "dead", "bias from", "to")
CURVES = (
    "Runs, sweeps, folders, or files with step and loss: metrics.jsonl, CSV or TSV with a header, JSON lines, W&B "
    "history or CSV export, Hugging Face's trainer_state.json, Megatron's log. The format is detected from the "
    "content."
)
"""Help text of the argument."""
TEXT_CHARACTERS = 600
"""Characters shown of each row; `--json` prints the whole text."""


def spikes(
    curves: Annotated[list[Path], typer.Argument(help=CURVES)],
    event: Annotated[int | None, typer.Option(help="Show event number K: evidence, and the text of its batch.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curve with its events shaded: .png, .svg or .pdf.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Reference run for tail gaps.")] = None,
    planned: Annotated[list[int] | None, typer.Option(help="A step with an intended jump (repeatable).")] = None,
    overwrite: Overwrite = False,
    rewound: Annotated[bool, typer.Option(help="Also count events that a rewind undid.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score curves for loss spikes: events, rates with intervals, published scores; several runs also together."""
    read = cache(partial(read_curve, planned=planned or ()))
    curves = find_runs(curves, note, files=True, trained=True, read=read)
    if event is not None or plot is not None:
        _refuse_several(curves, "--event" if event is not None else "--plot")
    if plot is not None:
        check_replaceable(plot, mark_of_plot(read(curves[0])), "--plot", overwrite)
    reports = [score_curve(curve, rewound) for curve in read_curves(curves, read)]
    against = [score_curve(read_curve(find_run(reference)), rewound)] if reference else []
    told = tell_apart([*reports, *against])
    reports, against = told[: len(curves)], told[len(curves) :]
    if plot is not None:
        plot_spikes(reports[0], plot)
    if event is not None:
        answer = _event(reports[0], event)
    elif len(reports) == 1 and not against:
        answer = reports[0].to_dict()
    else:
        answer = across_runs(reports, *against)
    if as_json:
        print_json(answer, indent=2)
        return
    console = LiteralConsole()
    if event is not None:
        _print_event(answer, console)
        return
    for report in reports:
        _print_report(report, console)
    if "pooled" in answer:
        _print_together(answer, console)
    if plot is not None:
        console.print(f"plot: {plot}")


def _refuse_several(curves: list[Path], option: str) -> None:
    """Raises ConfigError when `option` applies to one curve but several are given."""
    if len(curves) > 1:
        raise ConfigError("works for one curve only", field=option, value=len(curves), fix="name one curve at a time")


def _event(report: SpikeReport, number: int) -> dict[str, Any]:
    """One event with the steps around it, the evidence recorded at its first step, and the text of its batch."""
    event, opened = evidence_of(report, number)
    answer: dict[str, Any] = {"event": event.to_dict(), "around": lines_around(report, event), "opened": opened}
    answer["texts"] = []
    if report.curve.run_dir and event.samples_first >= 0:
        try:
            attempt = opened.get("attempt")
            answer["texts"] = batch_texts(report.curve.run_dir, event.start_step, event.samples_first, attempt)
        except KhaError as error:
            answer["no_texts"] = str(error)
    return answer


def _print_event(answer: dict[str, Any], console: Console) -> None:
    event = answer["event"]
    console.print(
        f"{event['class']} event, steps {event['start_step']} to {event['end_step']}, "
        f"{ENDINGS.get(event['class'], 'recovered')}: {_short(event['height'])} nats above "
        f"{_short(event['baseline'])}, area {_short(event['area'])}, "
        f"gradient norm up to {_short(event['gnorm_peak_ratio'])} times the usual",
    )
    names = [name for name in AROUND_COLUMNS if any(name in line for line in answer["around"])]
    table = Table(*(AROUND_COLUMNS[name] for name in names), title="steps around its start", title_justify="left")
    for line in answer["around"]:
        style = "bold" if line["step"] == event["start_step"] else ""
        table.add_row(*(_recorded(line.get(name, "")) for name in names), style=style)
    console.print(table)
    if answer["opened"]:
        _print_evidence(answer["opened"]["evidence"], console)
    else:
        console.print("no evidence was recorded for it")
    for text in answer["texts"]:
        console.print(f"--- sample {text['sample']} of {text['source']}")
        console.print(text["text"][:TEXT_CHARACTERS])
    if "no_texts" in answer:
        console.print(f"its text cannot be shown: {answer['no_texts']}")


def _print_evidence(evidence: dict[str, Any], console: Console) -> None:
    """What the probe measured in the model before the update of the event's first step."""
    logits, router = evidence.get("max_logits", []), evidence.get("router", [])
    without_experts = len(logits) - len(router)
    title = "gradients, attention and routing before the first update of the event"
    table = Table("", *LAYER_COLUMNS, title=title, title_justify="left")
    for name, norm in evidence.get("grad_norms", {}).items():
        head, _, number = name.rpartition(".")
        layer = int(number) if head and number.isdecimal() else -1
        cells = [_short(logits[layer])] if 0 <= layer < len(logits) else [""]
        if layer >= max(without_experts, 0) and router:
            found = router[layer - without_experts]
            cells += [_short(found[key]) for key in ("maxvio", "busiest", "dead", "bias_min", "bias_max")]
        table.add_row(name, _short(norm), *cells)
    console.print(table)
    if evidence.get("interactions"):
        table = Table("interaction", "norm", "distance from the identity")
        for name, entry in evidence["interactions"].items():
            far = "" if ".gate." in name else _short(entry.get("from_identity", ""))
            table.add_row(
                name.removesuffix(".weight").replace(".attention.interaction.", " "), _short(entry["norm"]), far
            )
        console.print(table)


def _print_report(report: SpikeReport, console: Console) -> None:
    summary = report.summary
    table = Table("#", *EVENT_COLUMNS, title=report.curve.label, title_justify="left")
    events = sorted([*report.events, *report.rewound], key=lambda event: event.start_step)
    for number, event in enumerate(events, start=1):
        fields = event.to_dict()
        mark = " (rewound)" if event in report.rewound else ""
        table.add_row(f"{number}{mark}", *(_short(fields[name]) for name in EVENT_COLUMNS.values()))
    console.print(table if events else f"{report.curve.label}: no events")
    for name, value in summary.items():
        if name not in ("rates", "by_class"):
            console.print(f"  {name:<22} {_short(value)}")
    for kind, sizes in summary["by_class"].items():
        words = ", ".join(f"{name} {_short(value)}" for name, value in sizes.items())
        console.print(f"  {kind:<22} {words}")
    for name, value in summary["rates"].items():
        console.print(f"  {name:<28} {_interval(value)}")
    for name, value in {**report.scores, **report.actions}.items():
        console.print(f"  {name:<28} {_short(value)}")
    if report.curve.repeated:
        console.print(f"  {report.curve.repeated} repeated steps: the last line of each was used")


def _print_together(answer: dict[str, Any], console: Console) -> None:
    pooled = answer["pooled"]
    diverged = ", ".join(pooled["diverged_runs"]) or "none"
    spikes_words = f"{pooled['spikes']} spikes, per 1k steps {_interval(pooled['per_1k_steps'])}"
    console.print(f"together: {spikes_words}; diverged: {diverged}")
    for label, events in answer["shared"].items():
        console.print(
            f"  {label}: {events['shared']} events shared with another run, {events['private']} private (matched by "
            f"{answer['shared_by']})",
        )
    for label, gap in answer["tail_gap"].items():
        console.print(
            f"  {label}: tail gap to {answer['reference']} {_short(gap['gap'])} nats "
            f"({gap['points']} points, at equal {gap['at']})"
        )


def _interval(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    return f"{_short(value['value'])} (95 % {_short(value['low'])} to {_short(value['high'])})"


def _recorded(value: Any) -> str:
    """The recorded value of a metric; a loss may be NaN."""
    return "nan" if isinstance(value, float) and math.isnan(value) else _short(value)


def _short(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
