"""`kha export RUN or CHECKPOINT --out DIR`: a directory that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kha_train.cli.answer import print_answer
from kha_train.cli.progress import progress_bar
from kha_train.errors import ConfigError
from kha_train.literal import say
from kha_train.record.finding import find_run

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = ("float32", "bfloat16")


def export(
    source: Annotated[
        Path, typer.Argument(help="A run directory (its newest checkpoint), or a step directory.", metavar="RUN")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write; it must not exist.")],
    absorb: Annotated[
        bool,
        typer.Option(
            "--absorb/--no-absorb", help="Multiply linear interactions into the weights, or keep them as heads."
        ),
    ] = True,
    dtype: Annotated[str, typer.Option(help=f"The dtype of the weights: {' or '.join(DTYPES)}.")] = "float32",
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Write what vLLM's classes want; transformers loads it too.")
    ] = False,
    shard_size: Annotated[str, typer.Option(help="The most that a file of weights holds, such as 500MB.")] = "5GB",
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer file, if the data of the run have moved.")
    ] = None,
    lines: Annotated[
        Path | None, typer.Option(help="Text whose lines are compared, instead of those of the validation set.")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Export a checkpoint for transformers, vLLM and lm-evaluation-harness.

    Another process then loads the result without the trainer, and compares logits and token ids. A mismatch leaves
    nothing behind (exit 4).

    Raises ConfigError for an option that makes no sense, and as `exporting.export`.
    """
    from kha_train.export.exporting import Request
    from kha_train.export.exporting import export as write
    from kha_train.export.tokenizer_files import Wanted

    if dtype not in DTYPES:
        raise ConfigError("no such dtype", field="--dtype", value=dtype, allowed=", ".join(DTYPES))
    wanted = Wanted(tokenizer, lines, no_tokenizer)
    request = Request(out, absorb, dtype, vllm, _bytes(shard_size), wanted)
    report = write(find_run(source), request, progress_bar)
    print_answer(report, as_json)
    if not as_json:
        say(f"verified: {out}")


def _bytes(size: str) -> int:
    """The bytes of a size such as 500MB. Raises ConfigError for anything else."""
    number, unit = size[:-2], size[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or not int(number):
        raise ConfigError(
            "is no size", field="--shard-size", value=size, allowed=f"a number and one of {', '.join(UNITS)}"
        )
    return int(number) * UNITS[unit]
