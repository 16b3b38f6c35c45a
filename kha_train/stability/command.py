"""The command spike-score: files in, scores out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .benchmark import command_rule, format_table, read_labelled, score_rule
from .document import document, plain
from .errors import CurveError
from .files import read_curve

EXIT_CODE = 2
"""That of a file that cannot be scored; argparse uses it for wrong options too."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the files named in `arguments` (None: of the process) and print a line or a document of each.

    Ends the process with 2 and one line on standard error when a file cannot be scored.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    if bool(asked.files) == (asked.rule is not None):
        parser.error("give files to score, or --rule COMMAND")
    try:
        if asked.rule is not None:
            found = score_rule([curve for _, curve in read_labelled()], command_rule(asked.rule))
            told = json.dumps(plain(found.to_dict()), indent=2) if asked.json else format_table({asked.rule: found})
            sys.stdout.write(told + "\n")
            return
        documents = {file: _scored(Path(file), asked.planned) for file in asked.files}
    except (CurveError, OSError) as error:
        sys.stderr.write(f"spike-score: {error}\n")
        raise SystemExit(EXIT_CODE) from error
    if asked.json:
        shown = next(iter(documents.values())) if len(documents) == 1 else documents
        sys.stdout.write(json.dumps(plain(shown), allow_nan=False, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{file}: {_line(one)}\n" for file, one in documents.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("spike-score", description="Score the loss spikes of training curves.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="CSV, JSON lines, trainer_state.json, Megatron log")
    parser.add_argument(
        "--planned", type=int, action="append", default=[], metavar="STEP", help="a step with an intended change"
    )
    parser.add_argument("--rule", metavar="COMMAND", help="score this spike rule on the labelled curves instead")
    parser.add_argument("--json", action="store_true", help="print the whole document")
    return parser


def _scored(file: Path, planned: Sequence[int]) -> dict[str, Any]:
    if file.exists() and not file.is_file():
        raise CurveError("it is not a file", field=str(file))
    rows = read_curve(file.read_bytes(), str(file))
    if not rows:
        raise CurveError("it has no step with a loss", field=str(file))
    return document(rows, planned)


def _line(found: dict[str, Any]) -> str:
    summary, rate = found["summary"], found["rates"]["per_1k_steps"]
    if rate["value"] is None:
        return "too short to judge"
    ends = ", diverged" if summary["diverged"] else ""
    return (
        f"{summary['spikes']} spikes in {summary['steps']} steps, {rate['value']:.3g} in 1,000 "
        f"({rate['low']:.3g} to {rate['high']:.3g}), {summary['unrecovered_total']} unrecovered{ends}"
    )
