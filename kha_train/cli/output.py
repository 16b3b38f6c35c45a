"""Output of commands with `--json`: one strict JSON value on standard output."""

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
"""The --overwrite option of commands that write one file or page."""


def print_json(answer: object, indent: int | None = None) -> None:
    """Print `answer` (plain values, nested) as strict JSON; `indent` as for `json.dumps`.

    JSON has no NaN and no infinity: NaN becomes null, infinities become the words "inf" and "-inf". Secrets are hidden
    before `answer` becomes text, because hiding them afterwards could remove a quote or a bracket too.
    """
    out = sys.stdout
    if isinstance(out, RedactedStream) and out.clean:
        out.flush()
        answer, out = out.clean(answer), out.behind
    print(as_text(answer, indent), file=out, flush=True)


def as_text(value: object, indent: int | None = None) -> str:
    """`value` as strict JSON, see `print_json`."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)


def note(text: str) -> None:
    """Print a remark on standard error."""
    say(f"note: {text}", err=True)


def strict(value: Json) -> Json:
    r"""`value` without anything that strict JSON cannot hold, at any depth. Replaced are non-finite numbers, lone
    surrogates in text (by their escape, such as \udcff) and keys that become equal as text.
    """
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
