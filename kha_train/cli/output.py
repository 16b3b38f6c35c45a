"""Answers of commands with `--json`: one strict JSON value on standard output."""

from __future__ import annotations

import json
import math
from typing import Any

import typer

from kha_train.literal import say


def print_json(answer: Any, indent: int | None = None) -> None:
    """Print `answer` (plain values, nested) as JSON that any parser takes; `indent` as for `json.dumps`.

    JSON has no NaN and no infinity: they become null, and the words "inf" and "-inf".
    """
    typer.echo(json.dumps(strict(answer), indent=indent, allow_nan=False))


def note(text: str) -> None:
    """A remark beside the answer, on standard error."""
    say(f"note: {text}", err=True)


def strict(value: Any) -> Any:
    """`value` with every number that JSON does not have replaced, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value
