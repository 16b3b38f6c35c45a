"""`kha generate MODEL`: continue texts with the newest checkpoint of a run, one checkpoint, or an export."""

# B rows   T tokens

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kha_train.cli.data_options import numbers_of
from kha_train.cli.output import print_json
from kha_train.errors import ConfigError, DataError
from kha_train.foreign.documents import parse_json
from kha_train.literal import LINES, say, visible
from kha_train.record.finding import find_run, is_export

if TYPE_CHECKING:
    from kha_train.decode.generate import Encoder
    from kha_train.decode.sampling import Sampling
    from kha_train.decode.writing import Continue

STDIN = Path("-")


def generate(
    model: Annotated[Path, typer.Argument(help="A run, the directory of a checkpoint, or an export.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeat for several.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File with a prompt a line (.jsonl: JSON texts); - reads standard input."),
    ] = None,
    ids: Annotated[str, typer.Option(help="The prompt as token ids, such as 1,2,3, instead of text.")] = "",
    tokens: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; below 1 sharpens, 0 always takes the most likely token.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many of the most likely tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens whose probabilities add up to this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text, alone and in any batch.")] = 0,
    samples: Annotated[int, typer.Option(help="Number of texts for each prompt.", min=1)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End a text before this text; repeat for several.")] = None,
    batch: Annotated[int, typer.Option(help="Texts to generate at the same time.", min=1)] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue texts, with a key/value cache and with the interaction absorbed where possible.

    A single text is printed as it is generated. Without a prompt, a new document is started. Raises ConfigError for
    ids beside texts.
    """
    from kha_train.decode.sampling import Sampling

    given = numbers_of(ids, "--ids")
    if given and (prompt or prompts):
        raise ConfigError("a prompt is given as ids or as text", field="--ids", value=ids, fix="give one of them")
    texts = [""] if given else _texts(prompt or [], prompts)
    sampling = Sampling(tokens, temperature, top_p, seed, top_k)
    place = model if is_export(model) else find_run(model)
    answer = _write(place, texts, given, sampling, samples, batch, tuple(stop or ()), as_json)
    if as_json:
        print_json(answer)


def _write(
    path: Path,
    texts: list[str],
    ids: Sequence[int],
    sampling: Sampling,
    samples: int,
    batch: int,
    stops: tuple[str, ...],
    silent: bool,
) -> dict[str, Any]:
    """Write the continuations, and say them unless `silent`: a single one as it grows. Raises ConfigError."""
    from kha_train.decode.generate import encode_prompt, too_long
    from kha_train.decode.writing import Order, Writing, write

    model = _of_export(path) if is_export(path) else _of_run(path)
    tokenizer = model.tokenizer
    if stops and tokenizer is None:
        raise ConfigError("needs a tokenizer, and the model's data has none", field="--stop", value=stops[0])
    prompts = [encode_prompt(tokenizer, text, ids, model.vocabulary) for text in texts]
    problem = sampling.invalid() or too_long(max(map(len, prompts)), sampling.tokens, model.longest)
    if problem:
        raise problem
    decode: Callable[..., str] = tokenizer.decode if tokenizer else lambda found: ",".join(map(str, found))
    shown = _Shown(texts[0] if tokenizer else "", silent or len(prompts) * samples > 1)

    def told(row: int, writing: Writing) -> None:
        """Show the part of a single text that is settled."""
        shown.upto(writing.settled(finished=False))

    order = Order(prompts, sampling, samples, batch, model.eos, stops)
    written = write(order, model.go_on, decode, told)
    if not shown.silent:
        shown.upto(written[0].text)
        say("")
    elif not silent:
        for row, one in enumerate(written):
            say((texts[row // samples] if tokenizer else "") + one.text)
    return {
        "run": str(path),
        "step": model.step,
        "prompt": prompts[0],
        "prompts": prompts,
        "ids": [one.ids for one in written],
        "texts": [one.text if tokenizer else None for one in written],
        "ends": [one.end for one in written],
    }


class _Model(NamedTuple):
    """What continues texts: its tokenizer (None: unknown), the id that ends a document, the number of ids, the most
    tokens of a text, and the step of its checkpoint (None: an export).
    """

    go_on: Continue
    tokenizer: Encoder | None
    eos: int | None
    vocabulary: int
    longest: int
    step: int | None


def _of_run(path: Path) -> _Model:
    from kha_train.decode.generate import generate, load_run

    loaded = load_run(path, report=lambda text: say(f"warning: {text}", err=True))
    eos = None if loaded.tokenizer is None else loaded.tokenizer.special_ids.get("eos")
    shape = loaded.config.model
    return _Model(
        lambda prompt_BT, sampling: generate(loaded.decoder, prompt_BT, sampling, eos),
        loaded.tokenizer,
        eos,
        shape.vocab_size,
        shape.seq_len,
        loaded.step,
    )


def _of_export(path: Path) -> _Model:
    from kha_train.evaluate.checkpoints import torch_device
    from kha_train.export.scoring import open_export

    loaded = open_export(path, "", torch_device("cpu"))
    tokenizer = loaded.tokenizer
    eos = None if tokenizer is None else tokenizer.special_ids.get("eos")
    return _Model(loaded.generate, tokenizer, eos, loaded.vocabulary, loaded.longest, None)


class _Shown:
    """A text on standard output that grows; `silent` ones are not shown."""

    def __init__(self, prompt: str, silent: bool) -> None:
        self.silent, self._shown = silent, 0
        self._write(prompt)

    def upto(self, text: str) -> None:
        """Show the part of `text` that was not shown yet."""
        self._write(text[self._shown :])
        self._shown = max(self._shown, len(text))

    def _write(self, text: str) -> None:
        if text and not self.silent:
            print(visible(text, LINES), end="", flush=True)


def _texts(given: list[str], file: Path | None) -> list[str]:
    """The prompts. Raises ConfigError when there is no such file or it has none, DataError for a bad line."""
    if file is None:
        return given or [""]
    if file != STDIN and not file.is_file():
        raise ConfigError("no such file", field="--prompts", value=str(file))
    try:
        lines = (sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")).split("\n")
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8", field="--prompts", value=str(file)) from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    as_json = file.suffix == ".jsonl"
    texts = [_text_of(line, number, file) if as_json else line for number, line in numbered]
    if not texts:
        raise ConfigError("holds no prompt", field="--prompts", value=str(file))
    return [*given, *texts]


def _text_of(line: str, number: int, file: Path) -> str:
    """The text in a line of JSON: itself, or the field `prompt` of an object. Raises DataError."""
    try:
        value: Any = parse_json(line.encode())
    except ValueError as error:
        raise DataError(f"line {number} is not JSON: {error}", field="--prompts", value=str(file)) from error
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"line {number} has no text", field="--prompts", value=str(file), allowed="a text a line")
    return text
