"""Prints the comparison on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kha_train.analysis.answer import answers
from kha_train.analysis.compare import Comparison
from kha_train.analysis.rows import honesty_rows, result_rows
from kha_train.analysis.summary import RESULTS, TOLD, UNKNOWN_FIGURE
from kha_train.literal import visible

NAME_WIDTH, DEFINITION_WIDTH = 26, 40
"""Width in characters that the table needs for names, and for readable definitions; the report always shows both."""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints figures with their definitions, differences in configuration, whether the data was the same, and the
    paired results.
    """
    wide = console.width >= DEFINITION_WIDTH + NAME_WIDTH + sum(len(run.label) + 2 for run in comparison.runs)
    parts: list[Any] = [_quantities(comparison, wide)]
    if comparison.differences:
        settings = _table("setting that differs", [run.label for run in comparison.runs])
        for key, values in comparison.differences.items():
            settings.add_row(*map(_text, (key, *values)))
        parts.append(settings)
    sentences = [comparison.validation_words, *(one.words for one in comparison.evaluations)]
    parts += [_text(words) for words in sentences if words]
    parts += [_text(pair.data_words) for pair in comparison.pairs]
    parts += [_text(words) for words in comparison.notes()]
    parts += [_text(comparison.sentence(pair), "bold") for pair in comparison.pairs]
    parts += [_text(words, "bold") for words in answers(comparison)]
    console.print(Group(*parts))


def _quantities(comparison: Comparison, with_definitions: bool) -> Table:
    table = _table("", [run.label for run in comparison.runs], "definition" if with_definitions else None)
    scored = [row for one in comparison.evaluations for row in one.rows()]
    rows = [*result_rows(comparison), *scored, *honesty_rows(comparison)]
    optional = {id(quantity) for quantity in (*RESULTS.values(), *TOLD.values())}
    for quantity, values in rows:
        if id(quantity) in optional and set(values) == {UNKNOWN_FIGURE}:
            continue
        definition = [_text(quantity.definition, "dim")] if with_definitions else []
        table.add_row(*map(_text, (quantity.name, *values)), *definition)
    return table


def _table(first: str, labels: list[str], last: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first)
    for label in labels:
        table.add_column(_text(label), justify="right")
    if last:
        table.add_column(last)
    return table


def _text(value: Any, style: str = "") -> Text:
    """A foreign name or value, printed literally."""
    return Text(visible(str(value)), style)
