"""From a configuration to batches: shards -> sample order -> rows -> packed batches with document borders.

The samples of optimiser step s are the numbers s*B ... s*B + B - 1, B = `data.global_batch_size`; rank r of R takes the
r-th of R contiguous slices. `order.SampleOrder` turns a sample number into a row of the dataset, `packing.RowGrid` into
a place in a shard, `shards.ShardSet` reads it, `packing.pack` finds the borders. World size, micro-batch and
accumulation change nothing about the samples of a step. The whole state of a stream is the count of samples seen.
"""

# B rows of this rank  T tokens of a row (`model.seq_len`)  S segment borders of the flattened B*T tokens  V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kha_train.config.constants import IGNORE_LABEL
from kha_train.config.schema import RunConfig
from kha_train.data.order import SampleOrder
from kha_train.data.packing import RowGrid, pack
from kha_train.data.shards import ShardSet
from kha_train.errors import ConfigError, DataError

TRAIN_SOURCE = "train"


@dataclass(frozen=True)
class Batch:
    """Rows of one rank for one optimiser step, or a part of them.

    `step` counts optimiser steps from 0. `samples_B` (NumPy int64) are global sample numbers; -1 is a filler row whose
    labels are all masked. `tokens_BT`, `labels_BT` (IGNORE_LABEL where masked) and `positions_BT` are int64 tensors;
    positions count from the start of the document's part inside the row, or of the row when documents are not
    isolated. `cu_seqlens_S` (int32) are the segment borders over the flattened B*T tokens: from 0 to B*T, every row
    start included. `max_seqlen` is the longest segment.
    """

    step: int
    samples_B: np.ndarray
    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    cu_seqlens_S: torch.Tensor
    max_seqlen: int

    @property
    def label_count(self) -> int:
        """The number of unmasked labels."""
        return int((self.labels_BT != IGNORE_LABEL).sum())

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """The batch in parts of `size` rows, in order; the last is smaller when `size` does not divide."""
        B, T = self.tokens_BT.shape
        for first in range(0, B, size):
            last = min(first + size, B)
            inside = (self.cu_seqlens_S >= first * T) & (self.cu_seqlens_S <= last * T)
            cu_seqlens_S = self.cu_seqlens_S[inside] - first * T
            yield Batch(
                step=self.step,
                samples_B=self.samples_B[first:last],
                tokens_BT=self.tokens_BT[first:last],
                labels_BT=self.labels_BT[first:last],
                positions_BT=self.positions_BT[first:last],
                cu_seqlens_S=cu_seqlens_S,
                max_seqlen=int(cu_seqlens_S.diff().max()),
            )


class TokenStream:
    """An endless iterator of one rank's `Batch` of each optimiser step, made by `open_stream`.

    `samples_seen` is the state: the number of global samples consumed. `content_id` names the data, `samples_per_epoch`
    and `tokens_per_epoch` are its size in rows and in tokens of those rows. All reads of a step happen inside `next()`,
    which raises DataError and leaves `samples_seen` as it was when the data is damaged.
    """

    def __init__(self, rows: _Rows, order: SampleOrder, *, batch_size: int, rank: int, world_size: int) -> None:
        self._rows, self._order = rows, order
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.samples_seen = 0
        self.content_id = rows.shards.content_id
        self.samples_per_epoch = rows.grid.rows
        self.tokens_per_epoch = rows.grid.rows * rows.grid.seq_len

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Batch:
        size = self._batch_size // self._world_size
        first = self.samples_seen + self._rank * size
        batch = self._rows.batch(
            step=self.samples_seen // self._batch_size,
            samples_B=np.arange(first, first + size, dtype=np.int64),
            rows_B=self._order.rows(first, size),
        )
        self.samples_seen += self._batch_size
        return batch


class _Rows:
    """Rows of a dataset by number, packed into batches."""

    def __init__(self, shards: ShardSet, seq_len: int, isolate_documents: bool) -> None:
        self.shards, self._isolate = shards, isolate_documents
        self.grid = RowGrid([shard.tokens for shard in shards.manifest.shards], seq_len)

    def batch(self, *, step: int, samples_B: np.ndarray, rows_B: np.ndarray) -> Batch:
        """The rows `rows_B`; a negative row number is a filler whose labels are all masked."""
        T = self.grid.seq_len
        rows = np.zeros((len(rows_B), T + 1), dtype=np.int64)
        ends = [np.empty(0, dtype=np.int64)] * len(rows_B)
        for j, row in enumerate(rows_B.tolist()):
            if row < 0:
                continue
            shard, start = self.grid.locate(row)
            rows[j] = self.shards.read(shard, start, T + 1)
            if self._isolate:
                ends[j] = self.shards.document_ends(shard, start, start + T) - start
        packed = pack(rows, ends, isolate_documents=self._isolate)
        packed.labels_BT[rows_B < 0] = IGNORE_LABEL
        return Batch(
            step=step,
            samples_B=samples_B,
            tokens_BT=torch.from_numpy(np.ascontiguousarray(packed.tokens_BT)),
            labels_BT=torch.from_numpy(packed.labels_BT),
            positions_BT=torch.from_numpy(packed.positions_BT),
            cu_seqlens_S=torch.from_numpy(packed.cu_seqlens_S),
            max_seqlen=int(np.diff(packed.cu_seqlens_S).max()),
        )


def open_stream(config: RunConfig, rank: int = 0, world_size: int = 1, *, samples_seen: int = 0) -> TokenStream:
    """The training batches of `rank`, beginning after `samples_seen` global samples.

    Raises ConfigError when the dataset is missing, too small for one row, made by another tokenizer or vocabulary, or
    the global batch does not divide by `world_size`; DataError when it is damaged.
    """
    batch_size = config.data.global_batch_size
    if batch_size % world_size:
        raise ConfigError(
            f"does not divide by the number of processes, {world_size}",
            field="data.global_batch_size",
            value=batch_size,
            allowed=f"a multiple of {world_size}",
        )
    rows = _open_rows(config, config.data.train, "data.train")
    order = SampleOrder(rows.grid.rows, seed=config.run.seed, source=TRAIN_SOURCE)
    stream = TokenStream(rows, order, batch_size=batch_size, rank=rank, world_size=world_size)
    stream.samples_seen = samples_seen
    return stream


def validation_batches(config: RunConfig, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Rows 0 ... n-1 of the validation set in order, n = `validation.rows` (0, or more than there are: all of them).

    Micro-batches of `engine.micro_batch_size` rows are dealt to the ranks in turn. Every rank gets the same number of
    batches of the same shape; rows beyond n are fillers (sample -1, all labels masked). Raises as `open_stream`, at the
    call, and DataError while reading.
    """
    rows = _open_rows(config, config.data.validation, "data.validation")
    train = ShardSet.open(config.data.train, field="data.train").manifest.tokenizer
    found = rows.shards.manifest.tokenizer
    if found.sha256 != train.sha256:
        raise ConfigError(
            "made by another tokenizer than data.train",
            field="data.validation",
            value=config.data.validation,
            fix="tokenize both with one tokenizer",
        )
    n = min(config.validation.rows or rows.grid.rows, rows.grid.rows)
    return _deal(rows, n, config.engine.micro_batch_size, rank, world_size)


def _deal(rows: _Rows, n: int, size: int, rank: int, world_size: int) -> Iterator[Batch]:
    for step, first in enumerate(range(0, n, size * world_size)):
        numbers = np.arange(first + rank * size, first + (rank + 1) * size, dtype=np.int64)
        numbers[numbers >= n] = -1
        yield rows.batch(step=step, samples_B=numbers, rows_B=numbers)


def bytes_per_id(config: RunConfig) -> torch.Tensor:
    """int64 [V]: the UTF-8 bytes each id of the validation set stands for (0 for control ids).

    Raises ConfigError and DataError as `open_stream`.
    """
    return torch.from_numpy(_open_shards(config, config.data.validation, "data.validation").bytes_per_id)


def unigram_bits_per_byte(config: RunConfig) -> float:
    """Bits per byte of the validation text under its own token frequencies: what a model without context can reach.

    Entropy of the counts c_v, sum of c_v log2(N / c_v), over the bytes of the text. Reads the whole validation set.
    Raises ConfigError and DataError as `open_stream`.
    """
    shards = _open_shards(config, config.data.validation, "data.validation")
    if shards.manifest.text_bytes == 0:
        raise DataError("its tokens stand for no text", field="data.validation", value=config.data.validation)
    counts_V = shards.token_counts()
    used = counts_V[counts_V > 0].astype(np.float64)
    bits = float((used * np.log2(used.sum() / used)).sum())
    return bits / shards.manifest.text_bytes


def _open_shards(config: RunConfig, directory: str, field: str) -> ShardSet:
    shards = ShardSet.open(directory, check_crc=config.data.check_crc, field=field)
    if shards.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{field} ({directory}) was made with a vocabulary of {shards.vocab_size}",
            field="model.vocab_size",
            value=config.model.vocab_size,
            fix=f"model.vocab_size={shards.vocab_size}, or other data",
        )
    shards.check_tokenizer()
    return shards


def _open_rows(config: RunConfig, directory: str, field: str) -> _Rows:
    rows = _Rows(_open_shards(config, directory, field), config.model.seq_len, config.data.isolate_documents)
    if rows.grid.rows == 0:
        longest = max(shard.tokens for shard in rows.shards.manifest.shards)
        raise ConfigError(
            f"no row of this length in {field} ({directory})",
            field="model.seq_len",
            value=config.model.seq_len,
            allowed=f"at most {longest - 1}, one less than the tokens of the largest shard",
        )
    return rows
