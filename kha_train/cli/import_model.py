"""`kha import DIR`: a stock model of transformers becomes a run directory to go on from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kha_train.cli.output import print_json
from kha_train.cli.progress import progress_bar
from kha_train.cli.train import Overrides
from kha_train.config.compose import quoted
from kha_train.literal import say

ROWS = 4096
"""The longest row in the suggested command. Models are often made for longer ones than a training needs."""


def import_model(
    directory: Annotated[
        Path, typer.Argument(help="A model directory with config.json and safetensors.", metavar="DIR")
    ],
    out: Annotated[Path, typer.Option(help="The run directory to write; it must not exist.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Import a stock model of transformers: GLM-4-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3, Qwen3 or Llama.

    The directory is data: no code of it runs, and an option that our decoder lacks is refused. The run has one
    checkpoint, of step 0, with the weights alone. A training takes them with run.init_from, whatever its interaction.
    With attention=kha_mlp or the like, the imported model has the interaction too, as the identity.
    """
    from kha_train.export.importing import prepare

    ready = prepare(directory, out, overrides or [])
    with progress_bar("importing", ready.elements) as advance:
        imported = ready.write(out, advance)
    train = shlex.join(_train(imported.settings, imported.config.model.seq_len, out))
    tokenize = shlex.join(_tokenize(imported.tokenizer, imported.config.model.vocab_size, out))
    answer: dict[str, Any] = {
        "class": imported.host,
        "run": str(imported.run),
        "checkpoint": str(imported.checkpoint),
        "parameters": imported.parameters,
        "interaction": imported.config.attention.interaction.name,
        "tokenizer": None if imported.tokenizer is None else str(imported.tokenizer),
        "left_out": list(imported.left_out),
        "settings": list(imported.settings),
        "tokenize": tokenize,
        "train": train,
    }
    if as_json:
        print_json(answer, indent=2)
        return
    say(f"{imported.host} of {imported.parameters:,} parameters, now {imported.checkpoint}")
    for text in imported.left_out:
        say(f"left out: {text}")
    say(f"to make shards of text: {tokenize} --text FOLDER" if tokenize else "it has no tokenizer.json")
    say(f"to train it further{_hint(imported.settings)}:")
    say(f"  {train}")


def _tokenize(tokenizer: Path | None, vocabulary: int, out: Path) -> list[str]:
    """The command that makes shards for the model, but for the text; empty without a tokenizer."""
    if tokenizer is None:
        return []
    command = ["kha", "data", "tokenize", "--tokenizer", str(tokenizer), "--out", str(out / "shards")]
    return [*command, "--vocab-size", str(vocabulary)]


def _hint(settings: tuple[str, ...]) -> str:
    """What may be added to the command, unless it has an interaction."""
    if any(text.startswith(("attention=kha", "interaction@")) for text in settings):
        return ""
    linear = "attention=mla" in settings
    added = "interaction@attention.interaction=knocking_linear" if linear else "attention=kha_mlp"
    return f" (add {added} for heads that exchange information; at first it changes nothing)"


def _train(settings: tuple[str, ...], longest: int, out: Path) -> list[str]:
    """The command that trains the imported weights further, on shards of its tokenizer."""
    places = {"run.dir": f"{out}-trained", "run.init_from": str(out)}
    places |= {"data.train": f"{out}/shards/train", "data.validation": f"{out}/shards/validation"}
    typed = {text.partition("=")[0] for text in settings}
    # The default preset is left out, so that another one can be added.
    model = [
        text for text in settings if text != "attention=gqa" and not text.startswith(("model.name=", "model.seq_len="))
    ]
    return [
        "kha", "train", *(f"{key}={quoted(value)}" for key, value in places.items() if key not in typed),
        f"model.seq_len={min(ROWS, longest)}", *model,
    ]  # fmt: skip
