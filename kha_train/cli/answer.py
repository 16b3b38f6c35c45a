"""How commands print nested values: as JSON, or as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Column, Table

from kha_train.cli.output import print_json
from kha_train.telemetry.terminal import table_console


def print_answer(answer: dict[str, Any], as_json: bool) -> None:
    """Print nested plain values as JSON, or as a table with a line for each value."""
    if as_json:
        print_json(answer)
        return
    table = Table("", Column("", overflow="fold"), show_header=False, box=None)
    for key, value in _flat(answer, ""):
        table.add_row(key, value)
    table_console().print(table)


def _flat(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, f"{prefix}{key} ")
        elif isinstance(entry, list) and entry and isinstance(entry[0], dict):
            yield from _flat({f"{key} {i + 1}": one for i, one in enumerate(entry)}, prefix)
        else:
            yield f"{prefix}{key}", str(entry)
