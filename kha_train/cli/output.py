"""Answers of commands with `--json`: one strict JSON value on standard output."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer

from kha_train.foreign.documents import Json
from kha_train.literal import say
from kha_train.record.streams import RedactedStream

Overwrite = Annotated[bool, typer.Option("--overwrite", "--force", help="Replace whatever is there.")]
"""The option of commands that write one file or page."""


def print_json(answer: object, indent: int | None = None) -> None:
    """Print `answer` (plain values, nested) as JSON that any parser takes; `indent` as for `json.dumps`.

    JSON has no NaN and no infinity: they become null, and the words "inf" and "-inf". Secrets are hidden in the answer
    before it becomes text: to hide them in the text could take a quote or a bracket with them.
    """
    out = sys.stdout
    if isinstance(out, RedactedStream) and out.clean:
        out.flush()
        answer, out = out.clean(answer), out.behind
    print(json.dumps(strict(answer), indent=indent, allow_nan=False), file=out, flush=True)


def note(text: str) -> None:
    """A remark beside the answer, on standard error."""
    say(f"note: {text}", err=True)


def strict(value: Json) -> Json:
    r"""`value` with everything replaced that strict JSON does not have, at any depth: numbers that are not finite, half
    of a surrogate pair (it becomes its escape, such as \udcff, in text), keys that are equal once they are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return _strict_object(value)
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


def _strict_object(value: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = written = strict(key if isinstance(key, str) else json.dumps(key))
        number = 1
        while name in found:
            number += 1
            name = f"{written} {number}"
        found[name] = strict(item)
    return found
