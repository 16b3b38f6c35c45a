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
from pathlib import Path
from typing import Any

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
from data_tools.files import Found, TextFile, as_text, find_files
from data_tools.staging import refuse_existing, replaced
from data_tools.texts import LeftOut, Piece, cut
from data_tools.workers import Advance, each
from kha_train.data.format.manifest import Manifest
from kha_train.data.tokenizer import Tokenizer
from kha_train.errors import ConfigError

VALIDATION_PERCENT = 2.0
_HASH_BYTES = 16


def encode_files(
    roots: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    field: str = "text",
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
    of each split. `field` is the text field in JSONL and Parquet. With `skip_bad_lines`, lines of JSONL without a text
    are left out, counted and listed.

    A unit of work, and so a shard of each split, has about `shard_bytes` of text; a compressed file is never cut.
    `progress` receives bytes of the files, twice those with `drop_repeated`. The rest is as for `encode_corpus`. Raises
    ConfigError and DataError as `encode_corpus` and `files.find_files` do, and ConfigError when a split gets no text.
    """
    below = _below(validation_percent)
    say = say or (lambda text: None)
    found = find_files(roots, "text", field)
    units = plan_units(found.files, shard_bytes)
    if not units:
        raise ConfigError("the files hold no text", field="text", value=[str(root) for root in roots])
    places = {split: Path(out) / split for split in SPLITS}
    for place in places.values():
        refuse_existing(place, overwrite=overwrite)
    pieces = (piece for unit in units for piece in unit.pieces)
    loaded = choose_encoder(tokenizer, encoder, texts_of(pieces, skip_bad_lines), say)
    for note in found.passed_over():
        say(note)
    about = _about(found, roots, validation_percent)
    if drop_repeated:
        units = without_repeated(units, workers, progress, skip_bad_lines)
        about["repeated"] = int(sum(unit.repeated.sum() for unit in units if unit.repeated is not None))
        say(f"{about['repeated']} texts left out as duplicates of earlier ones")
    identity = identity_of([identity_of_all(units, loaded), below, drop_repeated])
    with replaced(places, identity, overwrite=overwrite, keep=True) as beside:
        return encode_units(
            units,
            loaded,
            beside,
            {split: {"split": split, **about} for split in SPLITS},
            validation_below=below,
            skip_bad_lines=skip_bad_lines,
            workers=workers,
            progress=progress,
            finished=finished,
            say=say,
        )


def _below(validation_percent: float) -> int:
    """Texts whose hash is below this value are for validation. Raises ConfigError unless 0 < percentage < 100."""
    if not 0 < validation_percent < 100:
        raise ConfigError(
            "must be a percentage of the texts", field="validation_percent", value=validation_percent, allowed="0..100"
        )
    return int(validation_percent / 100 * 2**64)


def _about(found: Found, roots: Sequence[str | Path], validation_percent: float) -> dict[str, Any]:
    """What the manifests say about the text."""
    return {
        "files": len(found.files),
        "bytes": sum(file.path.stat().st_size for file in found.files),
        "roots": [as_text(Path(os.path.abspath(root)).name) for root in roots],
        "validation_percent": validation_percent,
    }


def plan_units(files: Iterable[TextFile], shard_bytes: int) -> list[Unit]:
    """Units of pieces in file order, each with about `shard_bytes` of text. Raises DataError for a file that cannot be
    read.
    """
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
