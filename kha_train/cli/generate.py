"""`kha generate RUN`: generate text from a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kha_train.cli.output import print_json
from kha_train.literal import say
from kha_train.record.finding import find_run


def generate(
    run: Annotated[Path, typer.Argument(help="A run directory with a checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; empty: start a new document.")] = "",
    ids: Annotated[str, typer.Option(help="The prompt as token ids, such as 1,2,3, instead of text.")] = "",
    tokens: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; below 1 sharpens, 0 always takes the most likely token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens whose probabilities add up to this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    samples: Annotated[int, typer.Option(help="Number of texts to generate.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sample from a trained run, with a key/value cache and with the interaction absorbed where possible."""
    from kha_train.decode.generate import Sampling, encode_prompt, load_run
    from kha_train.decode.generate import generate as draw_tokens

    run = find_run(run)
    model = load_run(run, report=lambda text: say(f"warning: {text}", err=True))
    prompt_ids = encode_prompt(model, prompt, _numbers(ids), samples)
    stop = None if model.tokenizer is None else model.tokenizer.special_ids.get("eos")
    drawn = draw_tokens(model.decoder, prompt_ids, Sampling(tokens, temperature, top_p, seed), stop)
    columns = [column.tolist() for column in drawn]
    rows = [_until(stop, row) for row in zip(*columns, strict=True)]
    texts = [None if model.tokenizer is None else model.tokenizer.decode(row) for row in rows]
    if as_json:
        answer = {"run": str(run), "step": model.step, "prompt": prompt_ids[0].tolist(), "ids": rows, "texts": texts}
        print_json(answer)
        return
    for row, text in zip(rows, texts, strict=True):
        say(",".join(map(str, row)) if text is None else prompt + text)


def _numbers(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")] if ids else []
    except ValueError:
        raise typer.BadParameter(f"{ids!r} is not a list of numbers such as 1,2,3", param_hint="--ids") from None


def _until(stop: int | None, row: tuple[int, ...]) -> list[int]:
    return list(row[: row.index(stop)]) if stop in row else list(row)
