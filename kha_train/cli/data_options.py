"""Options that several commands of `kha data` share, or that are long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.encode_files import VALIDATION_PERCENT
from data_tools.recipes import RECIPES
from kha_train.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Field = Annotated[
    str,
    typer.Option(help="Field with the text in JSONL lines and Parquet rows; meta.text is the field text inside meta."),
]
SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Skip JSONL lines without a text; they are counted and listed.")
]
CorpusDir = Annotated[Path, typer.Option("--corpus", help="A directory made by `kha data corpus`.")]
DatasetDir = Annotated[str, typer.Argument(help="A dataset (directory or URL), or a local directory of several.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help=(
            "Instead of --corpus: files and directories of .txt .md .rst .py .jsonl .json .parquet, .gz "
            ".zst, read in place."
        )
    ),
]
Recipe = Annotated[
    str, typer.Option(help=f"With --text: the public collection that the files are a copy of: {', '.join(RECIPES)}.")
]
ValidationPercent = Annotated[
    float | None,
    typer.Option(help=f"With --text: share of validation, by the hash of each text; {VALIDATION_PERCENT} unless set."),
]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes; the output does not depend on the number.")]
Encoder = Annotated[
    str, typer.Option(help="library (the tokenizer's own), or gigatoken: faster, checked to give the same ids.")
]


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers in `text`, between commas. Raises ConfigError, which names the `option`, for anything else."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError("not whole numbers", field=option, value=text, allowed="as 4,8,16") from None
