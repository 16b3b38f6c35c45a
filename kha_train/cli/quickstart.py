"""`kha quickstart`: from an empty directory to a comparison of two trained models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kha_train.cli.output import print_json
from kha_train.literal import say


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for corpus, tokenizer, shards, runs and report.")] = Path(
        "quickstart"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps per model.")] = 200,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to train on.")] = min(2, os.cpu_count() or 1),
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer.json or sentencepiece model instead of training one.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Corpus -> tokenizer -> shards -> a GQA and a KHA model -> comparison; offline, on a CPU, in minutes."""
    from kha_train.operate.quickstart import run_quickstart

    told = (lambda text: None) if json else say
    result = run_quickstart(out, steps=steps, processes=processes, say=told, tokenizer=tokenizer)
    if json:
        print_json(result)
