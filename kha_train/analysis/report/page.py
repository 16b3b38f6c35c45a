"""The report of a comparison: its sections in order, and the files in which they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kha_train.analysis.compare import Comparison
from kha_train.analysis.report import (
    answer,
    certificate,
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
from kha_train.analysis.report.content import Section
from kha_train.analysis.report.context import Context
from kha_train.analysis.report.files import CSV_HEADS, files_of
from kha_train.analysis.report.html import page
from kha_train.analysis.report.markdown import document
from kha_train.record.files import check_replaceable, is_made, mark_of
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
    certificate.section,
    provenance.section,
)
"""The sections in their order. A section without anything to show is left out."""
PAGE, DOCUMENT, FOLDER = "index.html", "report.md", "figures"
HEADS = (b"<!doctype html>", b"<!-- kha-compare ", b"<?xml ")
"""First bytes of the files of a report that hold its mark."""


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
    for picture in sorted((out / FOLDER).glob("*.svg")):
        check_replaceable(picture, mark, option, overwrite, HEADS)
    for numbers in sorted((out / FOLDER).glob("*.csv")):
        check_replaceable(numbers, "", option, overwrite, CSV_HEADS)


def write_report(comparison: Comparison, out: Path) -> Path:
    """Writes the page, the Markdown and, in `FOLDER`, the pictures and numbers of every figure; returns the path of the
    page. Creates the directory if needed. Replaces existing files, and removes figures of an earlier report that this
    one does not have: call `check_report` first.
    """
    context, mark = Context(comparison), mark_of_report([run.path for run in comparison.runs])
    sections, hidden = sections_of(context), Redactor.from_environment().text
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = files_of(sections, mark)
    for name, content in files.items():
        _write(folder / name, hidden(content))
    for path in sorted(path for path in folder.iterdir() if path.name not in files):
        if {".svg": is_made(path, mark, HEADS), ".csv": is_made(path, "", CSV_HEADS)}.get(path.suffix):
            path.unlink()
    words = document(title_of(comparison), mark, comparison.evidence, sections, FOLDER)
    _write(out / DOCUMENT, hidden(words))
    _write(page_in(out), hidden(report_html(comparison, sections)))
    return page_in(out)


def report_html(comparison: Comparison, sections: Sequence[Section] | None = None) -> str:
    """The whole page as text; `sections` are those of the comparison, if they have been made already."""
    context, mark = Context(comparison), mark_of_report([run.path for run in comparison.runs])
    sections = sections_of(context) if sections is None else sections
    return page(title_of(comparison), _meta(mark), comparison.evidence, sections, context.axes)


def sections_of(context: Context) -> tuple[Section, ...]:
    """The sections that have something to show, in order."""
    return tuple(found for make in SECTIONS if (found := make(context)) is not None)


def title_of(comparison: Comparison) -> str:
    """The heading of the report."""
    reference, *others = dict.fromkeys(run.variant for run in comparison.runs)
    return f"{', '.join(others)} against {reference}" if others else f"{len(comparison.runs)} x {reference}"


def _write(path: Path, content: str) -> None:
    """Writes a new file in the place of an old one, never into one that is linked from elsewhere."""
    path.unlink(missing_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(content)


def _meta(mark: str) -> str:
    command, _, digest = mark.partition(" ")
    return f'<meta name="{command}" content="{digest}">'
