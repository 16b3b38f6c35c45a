"""The rows on which a trained model is looked at: the same for every checkpoint, and for every run of the same data."""

# B rows

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from kha_train.analysis.heads.inspection import ProbeRows
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.data.sources import Place, first_training_set, open_rows

BATCH_TOKENS = 2048
"""Tokens of a forward, rounded down to whole rows, at least one."""


@dataclass(frozen=True)
class Probe:
    """The rows in `batches`, and what they are. `about.queries` is 0: it depends on who reads them."""

    batches: tuple[Batch, ...]
    about: ProbeRows


def open_probe(config: RunConfig, tokens: int, directory: str = "") -> Probe:
    """Rows of at least `tokens` places, or all there are, evenly spread over `data.validation`, over the first training
    set where the run has none, or over the dataset in `directory` (the option `--data`).

    Raises ConfigError and DataError as `stream.open_stream`.
    """
    place = _place(config, directory)
    rows = open_rows(config, place.path, place.field)
    count = min(rows.rows, -(-tokens // rows.seq_len))
    numbers_B = np.arange(count, dtype=np.int64) * rows.rows // count
    batch = Batch(numbers_B, rows.read(numbers_B), rows.layout(numbers_B))
    digest = hashlib.sha256(batch.rows_BW.astype("<u4").tobytes())
    for part in (batch.layout.borders_S, batch.layout.masked_M):
        digest.update(part.astype("<i8").tobytes())
    filled_B = batch.layout.filled_N
    padded = 0 if filled_B is None else int((filled_B < rows.seq_len).sum())
    about = ProbeRows(
        place.field,
        rows.shards.content_id,
        digest.hexdigest(),
        count,
        batch.token_count,
        len(batch.layout.borders_S) - 1 - padded,
        0,
    )
    return Probe(tuple(batch.micro_batches(max(1, BATCH_TOKENS // rows.seq_len))), about)


def _place(config: RunConfig, directory: str) -> Place:
    if directory:
        return Place(directory, "--data")
    if config.data.validation:
        return Place(config.data.validation, "data.validation")
    return first_training_set(config)
