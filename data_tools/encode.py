"""Encodes text into the datasets `train/` and `validation/` of one directory, with many processes.

First the files are cut into units by size alone; each unit becomes one shard. Each unit is read and encoded on its own,
so any number of processes writes the same files. Every document ends with the tokenizer's end-of-sequence id.
`encode_corpus` takes a corpus directory, whose files are the splits; `encode_files.py` takes the user's own files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.corpus import DESCRIPTION_NAME, SPLITS, split_path
from data_tools.files import TextFile
from data_tools.recipes import articles
from data_tools.staging import refuse_existing, replaced
from data_tools.texts import LeftOut, Piece, cut, texts
from data_tools.workers import Advance, each
from kha_train.data.format.canonical import canonical_json, parse_json, sha256_of_file
from kha_train.data.format.manifest import Manifest, ShardEntry, dtype_for
from kha_train.data.format.writer import ShardWriter, finished_shards, mark_finished, prepare, publish_dataset
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError, DataError

SHARD_BYTES = 512 << 20
ENCODERS = ("library", "gigatoken")
"""The tokenizer's own library, and a faster one."""
SAMPLE_CHARACTERS = 2 << 20
_BATCH_CHARACTERS = 1 << 20

Say = Callable[[str], None]


class Unit(NamedTuple):
    """The work for shard `number` of every split: pieces of files. `repeated` is true for each text that is left out
    (None: no text is). With `articles` the texts are lines of articles. Units of the same `identity` give the same
    shards under one tokenizer and encoder.
    """

    number: int
    pieces: tuple[Piece, ...]
    identity: str
    repeated: np.ndarray | None = None
    articles: bool = False


class Ids(NamedTuple):
    """How texts become ids, for other processes: the tokenizer's file and its hash, whether gigatoken encodes, the id
    that ends a document, and the number of ids.
    """

    tokenizer: Path
    sha256: str
    fast: bool
    end: int
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Ids:
        """Those of a tokenizer."""
        end = tokenizer.special_ids["eos"]
        return cls(tokenizer.path, tokenizer.sha256, tokenizer.is_fast, end, tokenizer.vocab_size)


class Job(NamedTuple):
    """What all units of one encoding share: where the splits go, and which texts go to validation when there is more
    than one split (those whose first 64 bits of SHA-256 are below `validation_below`). With `skip_bad_lines` a line
    without a text is skipped instead of ending the encoding.
    """

    ids: Ids
    workers: int
    directories: dict[str, Path]
    validation_below: int = 0
    skip_bad_lines: bool = False

    @property
    def dtype(self) -> str:
        """The type that shards store ids in."""
        return dtype_for(self.ids.vocab_size)

    def split_of(self, text: bytes) -> str:
        """The split of a text."""
        if len(self.directories) == 1:
            return next(iter(self.directories))
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        return "validation" if number < self.validation_below else "train"


class Encoded(NamedTuple):
    """The shard of each split that a unit produced (None: no document), and what was skipped while reading."""

    shards: dict[str, ShardEntry | None]
    left_out: LeftOut


def encode_corpus(
    corpus: str | Path,
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    skip_bad_lines: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    encoder: str = ENCODERS[0],
    say: Say | None = None,
    progress: Advance | None = None,
    finished: Advance | None = None,
) -> dict[str, Manifest]:
    """Write `out/train` and `out/validation` from a corpus directory; returns the manifest of each split.

    A shard holds whole documents of about `shard_bytes` of JSONL. `progress` receives bytes of JSONL, `finished` the
    bytes of text that this call encoded. `encoder` is one of `ENCODERS`; gigatoken is used once its ids were equal to
    those of the tokenizer's library on the first documents, and `say` receives which encoder is used and why. An
    interrupted encoding continues with the unfinished shards. Raises ConfigError for a missing corpus or tokenizer, an
    unavailable encoder, and existing datasets unless `overwrite`; DataError for a split without text and, unless
    `skip_bad_lines`, for a bad line.
    """
    files = {split: TextFile(f"{split}.jsonl", split_path(corpus, split)) for split in SPLITS}
    pieces = {split: list(cut(file, shard_bytes)) for split, file in files.items()}
    for split in SPLITS:
        if not pieces[split]:
            fix = (
                "add documents, or move lines between the two files; with --text you can choose the share of validation"
            )
            raise ConfigError("has no document", field="corpus", value=str(files[split].path), fix=fix)
    for split in SPLITS:
        refuse_existing(Path(out) / split, overwrite=overwrite)
    say = say or (lambda text: None)
    loaded = choose_encoder(tokenizer, encoder, texts_of(pieces["train"], skip_bad_lines), say)
    about = {split: _fingerprint(file.path) for split, file in files.items()}
    units = {
        split: [
            Unit(i, (piece,), identity_of([about[split]["sha256"], *piece[1:3]])) for i, piece in enumerate(each_piece)
        ]
        for split, each_piece in pieces.items()
    }
    places = {split: Path(out) / split for split in SPLITS}
    with replaced(
        places, identity_of_all(chain.from_iterable(units.values()), loaded), overwrite=overwrite, keep=True
    ) as beside:
        made: dict[str, Manifest] = {}
        for split in SPLITS:
            made |= encode_units(
                units[split],
                loaded,
                {split: beside[split]},
                {split: about[split]},
                say=say,
                workers=workers,
                progress=progress,
                finished=finished,
            )
    return made


def choose_encoder(given: str | Path | Tokenizer, encoder: str, sample: Iterable[str], say: Say) -> Tokenizer:
    """The tokenizer, given itself or by its file, or a faster encoder of it whose ids were equal on the first
    `SAMPLE_CHARACTERS` of `sample`.

    `say` receives which one is used, and why. Raises ConfigError for an unknown encoder or one that is not installed,
    and for a tokenizer without an end-of-sequence id.
    """
    tokenizer = given if isinstance(given, Tokenizer) else open_tokenizer(given)
    if "eos" not in tokenizer.special_ids:
        fix = "name the token that ends a document: --eos TOKEN"
        raise ConfigError("has no end-of-sequence id", field="tokenizer", value=str(tokenizer.path), fix=fix)
    if encoder in (ENCODERS[0], tokenizer.library):
        return tokenizer
    if encoder not in ENCODERS:
        raise ConfigError("no such encoder", field="encoder", value=encoder, allowed=", ".join(ENCODERS))
    fast = tokenizer.faster()
    documents = 0
    for batch in batches(_first(sample, SAMPLE_CHARACTERS)):
        try:
            same = all(map(np.array_equal, fast.encode(batch), tokenizer.encode(batch)))
        except DataError:
            same = False
        if not same:
            say(f"{tokenizer.library}, because {fast.encoder} gave other ids for the first documents")
            return tokenizer
        documents += len(batch)
    say(f"{fast.encoder}: the same ids as {tokenizer.library} in the first {documents} documents")
    return fast


def encode_units(
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    directories: dict[str, Path],
    about: dict[str, dict[str, Any]],
    *,
    validation_below: int = 0,
    skip_bad_lines: bool = False,
    workers: int,
    progress: Advance | None,
    finished: Advance | None,
    say: Say,
) -> dict[str, Manifest]:
    """Encode the unfinished units and publish a dataset for each split. `about` goes into the manifests; `say` receives
    what was already finished and what is left out. Raises as `encode_corpus`.
    """
    job = Job(Ids.of(tokenizer), workers, directories, validation_below, skip_bad_lines)
    units = [unit._replace(identity=_full_identity(unit, tokenizer, job)) for unit in units]
    identities = {unit.number: unit.identity for unit in units}
    found = {split: finished_shards(directory, identities) for split, directory in directories.items()}
    done = {
        index: {split: one[index] for split, one in found.items()}
        for index in set.intersection(*map(set, found.values()))
    }
    for directory in directories.values():
        prepare(directory, keep=done)
    todo = [unit for unit in units if unit.number not in done]
    if done:
        say(f"{len(done)} of {len(units)} shards were already finished")
    if progress is not None:
        progress(sum(piece.bytes for unit in units if unit.number in done for piece in unit.pieces))
    work, left_out = partial(encode_unit, job=job), LeftOut()
    for unit, encoded in zip(todo, each(work, todo, workers, progress), strict=True):
        done[unit.number] = encoded.shards
        if finished is not None:
            finished(sum(shard.text_bytes for shard in encoded.shards.values() if shard))
        left_out.add(encoded.left_out)
    for note in left_out.notes():
        say(note)
    for split in directories:
        if not any(shards[split] for shards in done.values()):
            fix = "more text" if len(directories) == 1 else "more text, or another --validation-percent"
            raise DataError(f"no text for {split}", field="text", fix=fix)
    return {
        split: publish_dataset(
            directory,
            [done[unit.number][split] for unit in units],
            tokenizer.entry(),
            dtype=job.dtype,
            corpus=about[split],
            tokenizer_file=tokenizer.path,
            encoder=tokenizer.encoder,
        )
        for split, directory in directories.items()
    }


def encode_unit(unit: Unit, advance: Advance, job: Job) -> Encoded:
    """Write the shards of a unit, one per split, and note that they are finished."""
    tokenizer = _loaded(job.ids, 1 if job.workers > 1 else None)
    end = np.asarray([job.ids.end], dtype=np.int32)
    prefix_bytes = len(tokenizer.prefix.encode())
    left_out = LeftOut(job.skip_bad_lines)
    kept = kept_texts(unit, left_out, advance)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(directory, unit.number, vocab_size=job.ids.vocab_size, dtype=job.dtype)
            )
            for split, directory in job.directories.items()
        }
        for batch in batches(kept):
            for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
                data = text.encode()
                writers[job.split_of(data)].add(np.concatenate((ids, end)), prefix_bytes + len(data))
        shards = {split: writer.finish() for split, writer in writers.items()}
    for split, directory in job.directories.items():
        mark_finished(directory, unit.number, shards[split], unit.identity)
    return Encoded(shards, left_out)


@lru_cache(maxsize=1)
def _loaded(ids: Ids, threads: int | None) -> Tokenizer:
    """The tokenizer of this process, cached: loading a large model takes longer than encoding a small unit."""
    tokenizer = open_tokenizer(ids.tokenizer, threads=threads)
    assert tokenizer.sha256 == ids.sha256, "the model file was replaced in the meantime"
    return tokenizer.faster() if ids.fast else tokenizer


def kept_texts(unit: Unit, left_out: LeftOut, advance: Advance) -> Iterator[str]:
    """The texts of a unit without the duplicates, in order."""
    every: Iterator[str] = chain.from_iterable(texts(piece, left_out, advance) for piece in unit.pieces)
    if unit.articles:
        every = articles(every)
    if unit.repeated is None:
        return every
    return (text for text, repeated in zip(every, unit.repeated.tolist(), strict=True) if not repeated)


def texts_of(pieces: Iterable[Piece], skip_bad_lines: bool = False) -> Iterator[str]:
    """The texts of pieces; skipped ones are not reported."""
    return chain.from_iterable(texts(piece, LeftOut(skip_bad_lines), lambda amount: None) for piece in pieces)


def batches(every: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about a million characters each."""
    batch: list[str] = []
    characters = 0
    for text in every:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def identity_of(parts: Sequence[object]) -> str:
    """A hash of the values that determine the output."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def identity_of_all(units: Iterable[Unit], tokenizer: Tokenizer) -> str:
    """A hash of everything that an encoding writes."""
    return identity_of([*_identity(tokenizer), [unit.identity for unit in units]])


def _first(every: Iterable[str], characters: int) -> Iterator[str]:
    """The first texts, up to the given number of characters or one text more."""
    seen = 0

    def more(text: str) -> bool:
        """Whether the limit was not reached before this text."""
        nonlocal seen
        seen += len(text)
        return seen - len(text) < characters

    return takewhile(more, every)


def _identity(tokenizer: Tokenizer) -> list[object]:
    return [tokenizer.sha256, tokenizer.encoder, tokenizer.vocab_size, tokenizer.special_ids["eos"]]


def _full_identity(unit: Unit, tokenizer: Tokenizer, job: Job) -> str:
    repeated = None if unit.repeated is None else hashlib.sha256(np.packbits(unit.repeated).tobytes()).hexdigest()
    splits = [sorted(job.directories), job.validation_below]
    return identity_of([unit.identity, *_identity(tokenizer), splits, repeated])


def _fingerprint(path: Path) -> dict[str, Any]:
    """What the manifest says about the text: the hash of the encoded file, and the corpus's own description."""
    description = path.with_name(DESCRIPTION_NAME)
    try:
        own = parse_json(description.read_bytes()) if description.is_file() else {}
    except ValueError as error:
        raise DataError(
            f"is not JSON: {error}", field=str(description), fix="delete it, or rebuild the corpus"
        ) from error
    return {"split": path.stem, "sha256": sha256_of_file(path), "corpus": own}
