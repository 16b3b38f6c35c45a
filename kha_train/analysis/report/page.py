"""The report of a comparison: its sections in order, and the files in which they are written."""

# N points of a series

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kha_train.analysis.compare import Comparison
from kha_train.analysis.report import (
    answer,
    cost,
    difference,
    fairness,
    honesty,
    loss,
    matrices,
    provenance,
    router,
    spikes,
    validation,
)
from kha_train.analysis.report.content import Figure, Section
from kha_train.analysis.report.context import AXES, Context
from kha_train.analysis.report.html import page
from kha_train.analysis.report.markdown import document
from kha_train.analysis.report.svg import standalone
from kha_train.record.files import check_replaceable, mark_of
from kha_train.record.redact import Redactor

SECTIONS: tuple[Callable[[Context], Section | None], ...] = (
    answer.section,
    fairness.section,
    loss.section,
    difference.section,
    validation.section,
    spikes.section,
    cost.section,
    router.section,
    matrices.section,
    honesty.section,
    provenance.section,
)
"""The sections in their order. A section without anything to show is left out."""
PAGE, DOCUMENT, FOLDER = "index.html", "report.md", "figures"
HEADS = (b"<!doctype html>", b"<!-- kha-compare ", b"<?xml ", b"# kha-compare ")
"""First bytes of the files of a report."""


def page_in(out: Path) -> Path:
    """The page that `write_report` writes in the directory `out`."""
    return out / PAGE


def mark_of_report(runs: Sequence[Path]) -> str:
    """The mark in every file of the report about `runs`; no other file has it."""
    return mark_of("compare", runs)


def check_report(out: Path, runs: Sequence[Path], option: str, overwrite: bool) -> None:
    """Before writing a report about `runs` in `out`: raises ConfigError, which names `option`, if a file there is
    not of a report about the same runs, unless `overwrite` is set.
    """
    mark = mark_of_report(runs)
    check_replaceable(page_in(out), _meta(mark), option, overwrite, HEADS)
    check_replaceable(out / DOCUMENT, mark, option, overwrite, HEADS)


def write_report(comparison: Comparison, out: Path) -> Path:
    """Writes the page, the Markdown and, in `FOLDER`, the pictures and numbers of every figure; returns the path of the
    page. Creates the directory if needed. Replaces existing files: call `check_report` first.
    """
    context, mark = Context(comparison), mark_of_report([run.path for run in comparison.runs])
    sections, hidden = sections_of(context), Redactor.from_environment().text
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for figure in (one for section in sections for one in section.figures()):
        for axis in figure.axes:
            picture = standalone(figure, axis, mark)
            (folder / f"{figure.name}-{axis.key}.svg").write_text(hidden(picture), encoding="utf-8")
        (folder / f"{figure.name}.csv").write_text(hidden(numbers(figure)), encoding="utf-8")
    title = title_of(comparison)
    words = document(title, mark, comparison.evidence, sections, FOLDER)
    (out / DOCUMENT).write_text(hidden(words), encoding="utf-8")
    page_in(out).write_text(hidden(report_html(comparison, sections)), encoding="utf-8")
    return page_in(out)


def report_html(comparison: Comparison, sections: Sequence[Section] | None = None) -> str:
    """The whole page as text; `sections` are those of the comparison, if they have been made already."""
    context, mark = Context(comparison), mark_of_report([run.path for run in comparison.runs])
    sections = sections_of(context) if sections is None else sections
    return page(title_of(comparison), _meta(mark), comparison.evidence, sections, context.axes or AXES[:1])


def sections_of(context: Context) -> tuple[Section, ...]:
    """The sections that have something to show, in order."""
    return tuple(found for make in SECTIONS if (found := make(context)) is not None)


def title_of(comparison: Comparison) -> str:
    """The heading of the report."""
    reference, *others = dict.fromkeys(run.variant for run in comparison.runs)
    return f"{', '.join(others)} against {reference}" if others else f"{len(comparison.runs)} x {reference}"


def numbers(figure: Figure) -> str:
    """The drawn points of a figure as CSV: one row a point, its place on every axis, its value, and its band."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = [axis.key for axis in figure.axes]
    writer.writerow(["series", "kind", *keys, "value", "low", "high"])
    for one in figure.series:
        nothing_N = np.full(len(one.y_N), np.nan)
        places = [one.x.get(key, nothing_N) for key in keys]
        band = [nothing_N if edge is None else edge for edge in (one.low_N, one.high_N)]
        for values in zip(*(column.tolist() for column in (*places, one.y_N, *band)), strict=True):
            writer.writerow([one.name, one.kind, *("" if math.isnan(value) else f"{value:.9g}" for value in values)])
    return file.getvalue()


def _meta(mark: str) -> str:
    command, _, digest = mark.partition(" ")
    return f'<meta name="{command}" content="{digest}">'
