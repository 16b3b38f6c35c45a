"""Encodes the user's own files in place: the text is not copied, and every process reads what it encodes.

The hash of a text decides whether it goes to validation, so that its split does not depend on its origin and no text is
in both. Exact duplicates are found beforehand, by all processes, from 128 bits of each text's SHA-256.
"""

# N texts

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.corpus import SPLITS
from data_tools.encode import (
    ENCODERS,
    SHARD_BYTES,
    Say,
    Unit,
    choose_encoder,
    encode_units,
    identity_of,
    identity_of_all,
    kept_texts,
    texts_of,
)
from data_tools.files import Found, TextFile, as_text
from data_tools.recipes import Recipe, recipe_named, select
from data_tools.staging import refuse_existing, replaced
from data_tools.texts import LeftOut, Piece, cut
from data_tools.workers import Advance, each
from kha_train.data.format.manifest import Manifest
from kha_train.data.tokenizer import Tokenizer
from kha_train.errors import ConfigError

VALIDATION_PERCENT = 2.0
_HASH_BYTES = 16


class Part(NamedTuple):
    """Units whose texts are divided among `splits`."""

    splits: tuple[str, ...]
    units: list[Unit]


def encode_files(
    roots: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    field: str = "text",
    recipe: str = "",
    validation_percent: float = VALIDATION_PERCENT,
    drop_repeated: bool = False,
    skip_bad_lines: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    encoder: str = ENCODERS[0],
    say: Say | None = None,
    progress: Advance | None = None,
    finished: Advance | None = None,
) -> dict[str, Manifest]:
    """Write `out/train` and `out/validation` from files and directories of text (see `files.py`); returns the manifest
    of each split. `field` is the text field in JSONL and Parquet. `recipe` names a public collection (see
    `recipes.py`), of which `roots` hold a copy. With `skip_bad_lines`, lines of JSONL without a text are left out,
    counted and listed.

    A unit of work, and so a shard of each split, has about `shard_bytes` of text; a compressed file is never cut.
    `progress` receives bytes of the files, twice those with `drop_repeated`. The rest is as for `encode_corpus`. Raises
    ConfigError and DataError as `encode_corpus` and `recipes.select` do, and ConfigError when a split gets no text.
    """
    below = _below(validation_percent)
    say = say or (lambda text: None)
    found, work = _planned(recipe_named(recipe) if recipe else None, roots, field, shard_bytes)
    places = {split: Path(out) / split for split in SPLITS}
    for place in places.values():
        refuse_existing(place, overwrite=overwrite)
    pieces = (piece for part in work for unit in part.units for piece in unit.pieces)
    loaded = choose_encoder(tokenizer, encoder, texts_of(pieces, skip_bad_lines), say)
    for note in found.passed_over():
        say(note)
    if drop_repeated:
        work = _distinct(work, workers, progress, skip_bad_lines)
        say(f"{_repeated(work)} texts left out as duplicates of earlier ones")
    about = _about(found, roots, validation_percent if len(work) == 1 else None, recipe)
    about |= {"repeated": _repeated(work)} if drop_repeated else {}
    every = (unit for part in work for unit in part.units)
    identity = identity_of([identity_of_all(every, loaded), below, drop_repeated])
    with replaced(places, identity, overwrite=overwrite, keep=True) as beside:
        made: dict[str, Manifest] = {}
        for splits, units in work:
            made |= encode_units(
                units,
                loaded,
                {split: beside[split] for split in splits},
                {split: {"split": split, **about} for split in splits},
                validation_below=below,
                skip_bad_lines=skip_bad_lines,
                workers=workers,
                progress=progress,
                finished=finished,
                say=say,
            )
        return made


def _repeated(work: Sequence[Part]) -> int:
    """The number of texts marked as duplicates."""
    marks = (unit.repeated for _, units in work for unit in units)
    return sum(int(one.sum()) for one in marks if one is not None)


def _planned(
    recipe: Recipe | None, roots: Sequence[str | Path], field: str, shard_bytes: int
) -> tuple[Found, list[Part]]:
    """The files, and the work. Raises ConfigError when there is no text."""
    found, groups = select(recipe, roots, field)
    articles = recipe is not None and recipe.articles
    work = [Part(splits, plan_units(files, shard_bytes, articles)) for splits, files in groups]
    if not all(part.units for part in work):
        raise ConfigError("the files hold no text", field="text", value=[str(root) for root in roots])
    return found, work


def _distinct(work: list[Part], workers: int, progress: Advance | None, skip_bad_lines: bool) -> list[Part]:
    """The same parts, without duplicates. Of a text that both splits of a collection have, validation keeps its own."""
    last_first = work[::-1]
    left = iter(
        without_repeated([unit for part in last_first for unit in part.units], workers, progress, skip_bad_lines)
    )
    return [part._replace(units=list(islice(left, len(part.units)))) for part in last_first][::-1]


def _below(validation_percent: float) -> int:
    """Texts whose hash is below this value are for validation. Raises ConfigError unless 0 < percentage < 100."""
    if not 0 < validation_percent < 100:
        raise ConfigError(
            "must be a percentage of the texts", field="validation_percent", value=validation_percent, allowed="0..100"
        )
    return int(validation_percent / 100 * 2**64)


def _about(found: Found, roots: Sequence[str | Path], validation_percent: float | None, recipe: str) -> dict[str, Any]:
    """What the manifests say about the text; no percentage where the collection has a validation split."""
    return {
        "files": len(found.files),
        "bytes": sum(file.path.stat().st_size for file in found.files),
        "roots": [as_text(Path(os.path.abspath(root)).name) for root in roots],
        "validation_percent": validation_percent,
        **({"recipe": recipe} if recipe else {}),
    }


def plan_units(files: Iterable[TextFile], shard_bytes: int, articles: bool = False) -> list[Unit]:
    """Units of pieces in file order, each with about `shard_bytes` of text; one unit of all lines of `articles`, which
    may go on in the next file. Raises DataError for a file that cannot be read.
    """
    if articles:
        pieces = [piece for file in files for piece in cut(file, shard_bytes)]
        return [_unit(0, pieces)._replace(articles=True)] if pieces else []
    units: list[Unit] = []
    together: list[Piece] = []
    taken = 0
    for piece in (piece for file in files for piece in cut(file, shard_bytes)):
        together.append(piece)
        taken += piece.text_bytes
        if taken >= shard_bytes:
            units.append(_unit(len(units), together))
            together, taken = [], 0
    return [*units, _unit(len(units), together)] if together else units


def without_repeated(
    units: Sequence[Unit], workers: int, progress: Advance | None, skip_bad_lines: bool = False
) -> list[Unit]:
    """The same units, with every text marked as repeated except the first of its kind."""
    hashes = list(each(partial(text_hashes, skip_bad_lines=skip_bad_lines), units, workers, progress))
    keys_N2 = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)
    # A stable sort keeps the first of equal texts first.
    order_N = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))
    same = (keys_N2[order_N[1:]] == keys_N2[order_N[:-1]]).all(axis=1)
    repeated_N = np.zeros(len(keys_N2), dtype=bool)
    repeated_N[order_N[1:][same]] = True
    ends = np.cumsum([len(one) // _HASH_BYTES for one in hashes])
    parts = np.split(repeated_N, ends[:-1])
    return [unit._replace(repeated=part) for unit, part in zip(units, parts, strict=True)]


def text_hashes(unit: Unit, advance: Advance, skip_bad_lines: bool = False) -> bytes:
    """The first 128 bits of the SHA-256 of every text of a unit, end to end."""
    every = kept_texts(unit, LeftOut(skip_bad_lines), advance)
    return b"".join(hashlib.sha256(text.encode()).digest()[:_HASH_BYTES] for text in every)


def _unit(index: int, pieces: Sequence[Piece]) -> Unit:
    stamps = []
    for piece in pieces:
        status = piece.file.path.stat()
        stamps.append([piece.file.name, piece.file.field, status.st_size, status.st_mtime_ns, piece.first, piece.last])
    return Unit(index, tuple(pieces), identity_of(stamps))
