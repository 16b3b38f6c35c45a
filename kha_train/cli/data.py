"""`kha data`: make shards from text, and inspect them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from data_tools.corpus import SPLITS, build_corpus, split_path
from data_tools.encode import ENCODERS, SHARD_BYTES, encode_corpus
from data_tools.encode_files import VALIDATION_PERCENT, encode_files
from data_tools.importers import DTYPES, import_tokens, tokenizer_of
from data_tools.recipes import recipe_named, select
from data_tools.task_documents import TASKS
from data_tools.tasks import DOCUMENTS, VALIDATION_DOCUMENTS, VOCAB_SIZE, Order, write_task
from data_tools.train_tokenizer import train_tokenizer
from kha_train.analysis.figures import save_bars
from kha_train.cli.answer import print_answer
from kha_train.cli.data_options import (
    CorpusDir,
    DatasetDir,
    Encoder,
    Field,
    Json,
    Recipe,
    SkipBadLines,
    Texts,
    ValidationPercent,
    Workers,
    numbers_of,
)
from kha_train.cli.output import Overwrite
from kha_train.cli.progress import progress_bar
from kha_train.config.compose import from_plain, load
from kha_train.data.format.manifest import MANIFEST_NAME, Manifest
from kha_train.data.format.shards import ShardSet
from kha_train.data.inspect import BORDER, decoder_of, digest, length_histogram, samples_of_step
from kha_train.data.tokenizer_kinds import chosen_tokenizer
from kha_train.errors import ConfigError, DataError, between
from kha_train.literal import say
from kha_train.record import config_of, read_attempts, read_events, read_metrics_at
from kha_train.record.actions import skip_windows
from kha_train.record.files import check_replaceable, mark_of

VERIFY_GIB = 1.0
"""Size of the block cache while a dataset at a URL is verified."""

app = typer.Typer(name="data", help="Prepare and check data: corpus, tokenizer, shards.", no_args_is_help=True)


@app.command()
def corpus(
    out: Annotated[Path, typer.Option(help="Output directory.")],
    extra_root: Annotated[
        list[Path] | None,
        typer.Option(help="A file or directory of your own text: .txt .md .rst .py .jsonl .json .parquet, .gz .zst"),
    ] = None,
    standard_library: Annotated[bool, typer.Option(help="Include Python's own standard library.")] = True,
    field: Field = "text",
    keep_repeated: Annotated[bool, typer.Option("--keep-repeated", help="Keep exact duplicates.")] = False,
    skip_bad_lines: SkipBadLines = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing corpus.")] = False,
    as_json: Json = False,
) -> None:
    """Collect text: the standard library's sources, and your own."""
    with progress_bar("reading", None) as advance:
        description = build_corpus(
            out,
            standard_library=standard_library,
            extra_roots=extra_root or (),
            field=field,
            keep_repeated=keep_repeated,
            skip_bad_lines=skip_bad_lines,
            overwrite=overwrite,
            progress=advance,
        )
    print_answer({"directory": str(out), **description}, as_json)


@app.command()
def tokenizer(
    corpus_dir: CorpusDir,
    out: Annotated[
        Path,
        typer.Option(help="File to write: NAME.model for sentencepiece, or NAME.json for tokenizers."),
    ],
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of ids, including special ones.")],
    max_bytes: Annotated[int, typer.Option(min=0, help="Train on this much text only; 0: all.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Train a BPE tokenizer on the training split."""
    total = split_path(corpus_dir, "train").stat().st_size
    with progress_bar("reading, then merging", min(total, max_bytes or total)) as advance:
        made = train_tokenizer(
            corpus_dir, out, vocab_size=vocab_size, max_bytes=max_bytes, overwrite=overwrite, progress=advance
        )
    answer = {"file": str(out), "vocab_size": made.vocab_size, "sha256": made.sha256, "special_ids": made.special_ids}
    print_answer(answer, as_json)


@app.command()
def tokenize(
    tokenizer_file: Annotated[
        Path,
        typer.Option(
            "--tokenizer", help="A tokenizer's file: tokenizer.model of `kha data tokenizer`, or tokenizer.json."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for train/ and validation/.")],
    corpus_dir: Annotated[Path | None, typer.Option("--corpus", help="A directory made by `kha data corpus`.")] = None,
    text: Texts = None,
    recipe: Recipe = "",
    field: Field = "text",
    validation_percent: ValidationPercent = None,
    drop_repeated: Annotated[bool, typer.Option("--drop-repeated", help="With --text: drop exact duplicates.")] = False,
    skip_bad_lines: SkipBadLines = False,
    eos: Annotated[str, typer.Option(help="The token that ends a document, if the tokenizer does not say.")] = "",
    vocab_size: Annotated[int, typer.Option(min=0, help="Ids of the model, if it has more than the tokenizer.")] = 0,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of text per shard.")] = SHARD_BYTES,
    workers: Workers = 1,
    encoder: Encoder = ENCODERS[0],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing datasets.")] = False,
    as_json: Json = False,
) -> None:
    """Encode text into shards; the same command continues an interrupted one.

    Raises ConfigError unless exactly one of --corpus and --text is given.
    """
    if (corpus_dir is None) == (not text):
        raise ConfigError("give exactly one of --corpus and --text", field="tokenize")
    if recipe and (corpus_dir or (recipe_named(recipe).validation and validation_percent is not None)):
        fix = "give the copy of the collection with --text, without --validation-percent if it has a validation split"
        raise ConfigError("says itself what is for validation", field="--recipe", value=recipe, fix=fix)
    if corpus_dir and (drop_repeated or validation_percent is not None):
        raise ConfigError(
            "a corpus is already split and deduplicated",
            field="--drop-repeated, --validation-percent",
            fix="pass the documents themselves with --text",
        )
    said: list[str] = []
    encoded: list[int] = []
    started = time.perf_counter()
    total, encode = _work(corpus_dir, text or [], recipe, field, validation_percent, drop_repeated)
    with progress_bar("tokenizing", total) as advance:
        manifests = encode(
            chosen_tokenizer(tokenizer_file, eos, vocab_size),
            out,
            shard_bytes=shard_bytes,
            workers=workers,
            overwrite=overwrite,
            encoder=encoder,
            skip_bad_lines=skip_bad_lines,
            say=said.append,
            progress=advance,
            finished=encoded.append,
        )
    answer = {split: _dataset(out / split, made) for split, made in manifests.items()}
    speed = round(sum(encoded) / 1e6 / (time.perf_counter() - started), 2)
    used = manifests["train"].tool.rpartition(", ")[2]
    print_answer({**answer, "encoder": used, "notes": said, "megabytes_per_second": speed}, as_json)


def _work(
    corpus_dir: Path | None, texts: list[Path], recipe: str, field: str, percent: float | None, drop_repeated: bool
) -> tuple[int, Callable[..., dict[str, Manifest]]]:
    """The number of bytes to read, and a function that encodes them: from the corpus if given, else from `texts`."""
    if corpus_dir:
        return sum(split_path(corpus_dir, split).stat().st_size for split in SPLITS), partial(encode_corpus, corpus_dir)
    found, _ = select(recipe_named(recipe) if recipe else None, texts, field)
    size = sum(file.path.stat().st_size for file in found.files)
    share = VALIDATION_PERCENT if percent is None else percent
    encode = partial(
        encode_files, texts, field=field, recipe=recipe, validation_percent=share, drop_repeated=drop_repeated
    )
    return size * (2 if drop_repeated else 1), encode


def _dataset(directory: Path, made: Manifest) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "tokens": made.tokens,
        "documents": made.documents,
        "text_bytes": made.text_bytes,
        "shards": len(made.shards),
        "content_id": made.content_id,
    }


@app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(help="megatron (.bin), datatrove (.ds) or numpy.")],
    files: Annotated[list[Path], typer.Argument(help="Token files, one shard each; they are used in place.")],
    out: Annotated[Path, typer.Option(help="Dataset directory to write.")],
    tokenizer_file: Annotated[Path | None, typer.Option("--tokenizer", help="The tokenizer's file.")] = None,
    vocab_size: Annotated[int, typer.Option(min=0, help="Number of ids, if you do not have the tokenizer.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Type of arrays without a header: {', '.join(DTYPES)}.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
    as_json: Json = False,
) -> None:
    """Use token files of other trainers as a dataset, without copying them."""
    entry = tokenizer_of(tokenizer_file, vocab_size)
    made = import_tokens(kind, files, out, entry, overwrite=overwrite, tokenizer_file=tokenizer_file, dtype=dtype)
    print_answer({"directory": str(out), "tokens": made.tokens, "documents": made.documents}, as_json)


@app.command()
def synthetic(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    out: Annotated[Path, typer.Option(help="Directory for train/ and validation/.")],
    documents: Annotated[int, typer.Option(min=1, help="Documents for training.")] = DOCUMENTS,
    validation_documents: Annotated[int, typer.Option(min=1, help="Documents held out.")] = VALIDATION_DOCUMENTS,
    levels: Annotated[str, typer.Option(help="Difficulties, as 4,8,16; each task counts its own.")] = "",
    symbols: Annotated[int, typer.Option(min=0, help="Number of different symbols; 0: the task's own.")] = 0,
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of ids.")] = VOCAB_SIZE,
    seed: Annotated[int, typer.Option(help="Another seed gives other documents.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing datasets.")] = False,
    as_json: Json = False,
) -> None:
    """Write a task with known answers, which `evaluation.tasks=[answers]` scores (docs/tasks.md)."""
    sizes = (documents, validation_documents, numbers_of(levels, "--levels"), symbols, vocab_size, seed)
    order = Order(task, *sizes).complete()
    with progress_bar("writing", documents + validation_documents) as advance:
        made = write_task(order, out, overwrite=overwrite, progress=advance)
    longest = max(manifest.corpus["longest"] for manifest in made.values())
    answer: dict[str, Any] = {split: _dataset(out / split, manifest) for split, manifest in made.items()}
    settings = f"model.vocab_size={vocab_size} model.seq_len={longest} data.packing=best_fit"
    print_answer({**answer, "longest_document": longest, "settings": settings}, as_json)


@app.command()
def verify(directory: DatasetDir, as_json: Json = False) -> None:
    """Read every byte of a dataset and compare it with its manifest. For URLs, check the remote copy.

    Raises DataError after all shards are read if any is damaged; reports the first fault of each shard.
    """
    answer: dict[str, dict[str, Any]] = {}
    faults: list[DataError] = []
    for path in _datasets(directory):
        with TemporaryDirectory() as cache:
            shards = ShardSet.open(path, cache=cache, cache_gib=VERIFY_GIB)
            shards.check_tokenizer()
            with progress_bar(f"verifying {path}", shards.manifest.tokens) as advance:
                faults += _faults(shards, advance)
        answer[path] = {"ok": True, "tokens": shards.manifest.tokens, "content_id": shards.content_id}
    if len(faults) > 1:
        for fault in faults:
            say(fault.line(), err=True)
        raise DataError(f"{len(faults)} shards are damaged, see above", field=directory)
    if faults:
        raise faults[0]
    print_answer(answer, as_json)


def _faults(shards: ShardSet, advance: Callable[[int], None]) -> Iterator[DataError]:
    for index, entry in enumerate(shards.manifest.shards):
        try:
            shards.verify(index)
        except DataError as error:
            yield error
        advance(entry.tokens)


@app.command()
def inspect(
    directory: Annotated[
        str | None, typer.Argument(help="A dataset (directory or URL), or a local directory of several.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of text excerpts to show.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per excerpt.")] = 128,
    run: Annotated[Path | None, typer.Option(help="Instead of a dataset: a run directory; needs --step.")] = None,
    step: Annotated[int, typer.Option(min=0, help="Step whose samples to show.")] = 0,
    rank: Annotated[int, typer.Option(min=-1, help="Show this rank only; -1: all ranks.")] = -1,
    png: Annotated[Path | None, typer.Option(help="Draw a histogram of document lengths into this .png file.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show statistics and excerpts of a dataset, or the exact samples of a step; document borders are shown as ‖.

    Raises ConfigError unless either a dataset or a run with a step is given.
    """
    if (run is None) == (directory is None):
        raise ConfigError("give a dataset directory, or --run with --step", field="inspect")
    if run is not None:
        if png is not None:
            raise ConfigError("works for a dataset only", field="--png", fix="name a dataset instead of a run")
        print_answer(_samples_of_run(run, step, rank), as_json)
        return
    assert directory is not None, "exactly one of the two is given"
    answer, datasets = {}, _datasets(directory)
    mark = mark_of("inspect", datasets)
    if png is not None:
        if png.suffix.lower() != ".png":
            raise ConfigError("is not a PNG file", field="--png", value=str(png), allowed="a name that ends in .png")
        check_replaceable(png, mark, "--png", overwrite)
    for path in datasets:
        shards = ShardSet.open(path)
        answer[path] = {**_statistics(shards), "samples": list(_samples(shards, samples, tokens))}
    counts = {path: found["documents_by_tokens"] for path, found in answer.items()}
    if png is not None:
        names = {f"documents in {path.rstrip('/').rpartition('/')[2]}": bars for path, bars in counts.items()}
        save_bars(png, names, x_label="tokens of a document", mark=mark)
    for path, found in answer.items():
        if png is not None:
            found["png"] = str(png)
        if not as_json:
            found["documents_by_tokens"] = _bars(counts[path])
    print_answer(answer, as_json)


def _samples_of_run(run: Path, step: int, rank: int) -> dict[str, Any]:
    """Raises ConfigError for a missing run, step or rank, and when the data are not those the run read."""
    line = read_metrics_at(run, step)
    if line is None:
        raise ConfigError(
            "the run has no record of this step", field="step", value=step, fix=f"see {run}/metrics.jsonl"
        )
    attempts, number = read_attempts(run), line.get("attempt", 1)
    saved, attempt = config_of(attempts, number), attempts.get(number)
    ranks = attempt.world_size or 1 if attempt else 1
    if rank >= ranks:
        raise ConfigError(
            "the run had no such rank at this step", field="rank", value=rank, allowed=between(0, ranks - 1)
        )
    samples = samples_of_step(
        from_plain(saved) if saved else load(run / "config.yaml"),
        step=step,
        samples_first=line["samples_first"],
        samples_last=line["samples_last"],
        skip_windows=skip_windows(read_events(run)),
        content_id=attempt.facts.get("data_content_id") if attempt else None,
        **({"rank": rank, "world_size": ranks} if rank >= 0 else {}),
    )
    unknown = (
        {} if saved else {"note": f"the settings of start {number} were not recorded; using those of the last start"}
    )
    return {"step": step, "samples": list(samples), **unknown}


def _datasets(directory: str) -> list[str]:
    """Raises ConfigError for shards without a manifest: they are not a dataset, but may once have been one."""
    local = Path(directory)
    if "://" in directory or (local / MANIFEST_NAME).exists():
        return [directory]
    for path in sorted(local.glob("*/shard-*.tok")):
        if not (path.parent / MANIFEST_NAME).exists():
            raise ConfigError(f"shards, but no {MANIFEST_NAME}", field="dataset", value=str(path.parent))
    return sorted(str(path.parent) for path in local.glob(f"*/{MANIFEST_NAME}")) or [directory]


def _statistics(shards: ShardSet) -> dict[str, Any]:
    manifest = shards.manifest
    lengths = np.concatenate(list(shards.document_lengths()))
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1], method="nearest").astype(int).tolist()
    return {
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "text_bytes": manifest.text_bytes,
        "bytes_per_token": round(manifest.text_bytes / manifest.tokens, 3),
        "document_tokens": dict(zip(("min", "p10", "median", "p90", "max"), quantiles, strict=True)),
        "documents_by_tokens": length_histogram(shards),
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "tokenizer": f"{manifest.tokenizer.kind}, {manifest.tokenizer.vocab} ids, {manifest.tokenizer.sha256[:12]}",
        "tool": manifest.tool,
        "content_id": manifest.content_id,
    }


def _samples(shards: ShardSet, count: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Excerpts at even distances over the dataset."""
    decode = decoder_of(shards)
    sizes = [shard.tokens for shard in shards.manifest.shards]
    starts_of_shards = np.cumsum([0, *sizes])
    for number in range(count):
        place = shards.manifest.tokens * number // count
        shard = int(np.searchsorted(starts_of_shards, place, side="right")) - 1
        start = place - int(starts_of_shards[shard])
        stop = min(start + tokens, sizes[shard])
        ids = shards.read(shard, start, stop - start)
        parts = np.split(ids, shards.document_ends(shard, start, stop) - start)
        yield {
            "sample": number,
            "shard": shard,
            "token": start,
            "sha256": digest(ids),
            "text": BORDER.join(map(decode, parts)),
        }


def _bars(counts: dict[str, int]) -> dict[str, str]:
    """A histogram in lines of text."""
    most = max(counts.values())
    return {name: f"{count:>9} {'#' * round(40 * count / most)}".rstrip() for name, count in counts.items()}
