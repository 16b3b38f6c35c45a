"""From a configuration to batches: sources -> sample order -> rows -> packed batches with document borders.

A step takes the next `data.global_batch_size` sample numbers that lie in no skip window; rank r of R takes the r-th of
R contiguous slices. `sources.Samples` turns a number into a row of a dataset and reads it. World size, micro-batch and
accumulation change nothing about the samples of a step. The whole state of a stream is the next sample number and the
skip windows.
"""

# B rows of this rank  G rows of all ranks  T tokens of a row (`model.seq_len`)  W = T + 1  V vocabulary
# S steps  N samples of a few steps
# M masked places of the flattened rows

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from kha_train.config.schema import RunConfig
from kha_train.data.batch import Batch
from kha_train.data.packing import Layout
from kha_train.data.skipping import Window, merged, numbers_past
from kha_train.data.sources import Rows, Samples, open_rows, open_samples, open_shards
from kha_train.errors import ConfigError, DataError, KhaError

_PLANNED_ROWS = 512
"""So many rows are planned at once, for a call has a fixed price."""
_READ_ROWS = 32
"""So many rows are read at once where steps are small."""


class _Plan(NamedTuple):
    """One step of one rank, located but not read: it begins at sample `position`, the next one at `following`."""

    position: int
    following: int
    samples_B: np.ndarray
    sources_B: np.ndarray
    rows_B: np.ndarray
    layout: Layout


class TokenStream:
    """An endless iterator of one rank's `Batch` of each optimiser step, made by `open_stream`.

    The state, the same on every rank: `samples_seen`, the next global sample number, and `skip_windows`, the numbers
    [first, last) never to be trained on; both may be set at any time between steps. `content_id` names the data,
    `samples_per_epoch` and `tokens_per_epoch` are its size in rows and in tokens of those rows. With `data.prefetch` a
    thread reads so many steps ahead. A step that meets damage, its own or that of one planned and read with it, raises
    DataError from `next()` and leaves `samples_seen` as it was.
    """

    def __init__(self, samples: Samples, *, batch_size: int, rank: int, world_size: int, prefetch: int = 0) -> None:
        self.samples, self.samples_seen = samples, 0
        self._skip_windows: tuple[Window, ...] = ()
        self._batch_size, self._prefetch = batch_size, prefetch
        size = batch_size // world_size
        self._slice = slice(rank * size, (rank + 1) * size)
        self._most_steps, self._steps_planned, self._planned_to = max(1, _PLANNED_ROWS // size), 1, -1
        self._plans: deque[_Plan] = deque()
        self._read: deque[tuple[_Plan, np.ndarray]] = deque()
        self._ahead: deque[tuple[_Plan, Future[np.ndarray]]] = deque()
        self._reader = ThreadPoolExecutor(1, "data-prefetch") if prefetch else None
        self._waited = 0.0
        self.content_id = samples.content_id
        self.samples_per_epoch = samples.rows
        self.tokens_per_epoch = samples.rows * samples.seq_len

    @property
    def skip_windows(self) -> tuple[Window, ...]:
        """Sample numbers [first, last) that are passed over, ascending and apart from each other."""
        return self._skip_windows

    @skip_windows.setter
    def skip_windows(self, windows: Iterable[Window]) -> None:
        self._skip_windows = merged(windows)
        self._plans.clear()
        self._read.clear()
        self._ahead.clear()

    def __iter__(self) -> TokenStream:
        return self

    def take_wait_seconds(self) -> float:
        """Seconds spent inside `next()` since the last call; starts again from zero."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            plan, rows_BW = self._read_ahead() if self._reader else self._read_now()
        finally:
            self._waited += time.perf_counter() - started
        step = self.samples_seen // self._batch_size
        self.samples_seen = plan.following
        return Batch(step, plan.samples_B, rows_BW, plan.layout)

    def _read_now(self) -> tuple[_Plan, np.ndarray]:
        if not self._read or self._read[0][0].position != self.samples_seen:
            self._read = deque(self._read_some())
        return self._read.popleft()

    def _read_some(self) -> Iterator[tuple[_Plan, np.ndarray]]:
        """The step at `samples_seen`, and steps after it where they are small."""
        size = len(self._plan(self.samples_seen).rows_B)
        plans = list(islice(self._plans, max(1, _READ_ROWS // size)))
        sources_N = np.concatenate([plan.sources_B for plan in plans])
        rows_NW = self.samples.read(sources_N, np.concatenate([plan.rows_B for plan in plans]))
        for number, plan in enumerate(plans):
            self._plans.popleft()
            yield plan, rows_NW[number * size : (number + 1) * size]

    def _read_ahead(self) -> tuple[_Plan, np.ndarray]:
        """The batch at `samples_seen`, and as many steps after it under way as `data.prefetch` says."""
        if self._ahead and self._ahead[0][0].position != self.samples_seen:
            self._ahead.clear()
        position = self._ahead[-1][0].following if self._ahead else self.samples_seen
        while len(self._ahead) <= self._prefetch:
            plan = self._plan(position)
            self._plans.popleft()
            self._ahead.append((plan, self._reader.submit(self.samples.read, plan.sources_B, plan.rows_B)))
            position = plan.following
        plan, reading = self._ahead[0]
        try:
            rows_BW = reading.result()
        except KhaError:
            self._ahead.clear()
            raise
        self._ahead.popleft()
        return plan, rows_BW

    def _plan(self, position: int) -> _Plan:
        """The plan of the step that begins at `position`, at the head of `_plans`; several are made at once.

        After a jump the first plan is of one step, each later one of twice as many: a jump answers at once.
        """
        if not self._plans or self._plans[0].position != position:
            goes_on = position == self._planned_to
            self._steps_planned = min(2 * self._steps_planned, self._most_steps) if goes_on else 1
            self._plans = deque(self._plan_from(position))
            self._planned_to = self._plans[-1].following
        return self._plans[0]

    def _plan_from(self, position: int) -> Iterator[_Plan]:
        numbers_SG = self._numbers(position, self._steps_planned)
        samples_SB = numbers_SG[:, self._slice]
        following_S = (numbers_SG[:, -1] + 1).tolist()
        if self.samples.looks_ahead:
            self._expect(samples_SB, following_S[-1])
        sources_N, rows_N = self.samples.locate(samples_SB.reshape(-1))
        layout = self.samples.layout(sources_N, rows_N)
        size = samples_SB.shape[1]
        parts = layout.parts(size, self.samples.seq_len)
        for number, (samples_B, following, part) in enumerate(zip(samples_SB, following_S, parts, strict=True)):
            rows = slice(number * size, (number + 1) * size)
            yield _Plan(position, following, samples_B, sources_N[rows], rows_N[rows], part)
            position = following

    def _expect(self, samples_SB: np.ndarray, position: int) -> None:
        """Tell the datasets the rows of these steps and of as many after `position`."""
        later_SB = self._numbers(position, len(samples_SB))[:, self._slice]
        self.samples.expect(*self.samples.locate(np.concatenate((samples_SB, later_SB), axis=None)))

    def _numbers(self, position: int, steps: int) -> np.ndarray:
        """The sample numbers of so many global batches, the first of which begins at `position`: [steps, G]."""
        return numbers_past(self._skip_windows, position, steps * self._batch_size).reshape(steps, -1)


def open_stream(
    config: RunConfig,
    rank: int = 0,
    world_size: int = 1,
    *,
    samples_seen: int = 0,
    skip_windows: Iterable[Window] = (),
) -> TokenStream:
    """The training batches of `rank`, beginning at global sample `samples_seen`, without the `skip_windows`.

    Raises ConfigError when a dataset is missing, too small for one row, made by another tokenizer or vocabulary, or
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
    samples = open_samples(config)
    stream = TokenStream(
        samples, batch_size=batch_size, rank=rank, world_size=world_size, prefetch=config.data.prefetch
    )
    stream.samples_seen, stream.skip_windows = samples_seen, skip_windows
    return stream


def validation_batches(config: RunConfig, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The batches of a `ValidationSet` opened for this once. Raises as `ValidationSet`."""
    return ValidationSet(config).batches(rank, world_size)


class ValidationSet:
    """The validation set, opened and checked once; `batches` reads it, as often as it is asked.

    `shards` is the dataset, `bytes_per_id_V` (int64) the UTF-8 bytes each id stands for.

    Raises ConfigError and DataError as `open_stream`, and ConfigError when another tokenizer made it than the training
    data.
    """

    def __init__(self, config: RunConfig) -> None:
        self._rows = open_rows(config, config.data.validation, "data.validation")
        directory, field = config.data.train, "data.train"
        if config.data.sources:
            directory, field = config.data.sources[0].path, "data.sources[0].path"
        self.shards = self._rows.shards
        train = open_shards(config, directory, field).manifest.tokenizer
        if self._rows.shards.manifest.tokenizer.sha256 != train.sha256:
            raise ConfigError(
                "made by another tokenizer than data.train",
                field="data.validation",
                value=config.data.validation,
                fix="tokenize both with one tokenizer",
            )
        self.bytes_per_id_V = torch.from_numpy(self.shards.bytes_per_id)
        self._count = min(config.validation.rows or self._rows.rows, self._rows.rows)
        self._size = config.engine.micro_batch_size

    def batches(self, rank: int, world_size: int) -> Iterator[Batch]:
        """Rows 0 ... n-1 in order, n = `validation.rows` (0, or more than there are: all of them).

        Micro-batches of `engine.micro_batch_size` rows are dealt to the ranks in turn. Every rank gets the same number
        of batches of the same shape; rows beyond n are fillers (sample -1, all labels masked). Raises DataError while
        reading.
        """
        return _deal(self._rows, self._count, self._size, rank, world_size)


def _deal(rows: Rows, n: int, size: int, rank: int, world_size: int) -> Iterator[Batch]:
    T = rows.seq_len
    for step, first in enumerate(range(0, n, size * world_size)):
        numbers = np.arange(first + rank * size, first + (rank + 1) * size, dtype=np.int64)
        real = numbers[numbers < n]
        rows_BW = np.zeros((size, T + 1), dtype=rows.shards.dtype)
        rows_BW[: len(real)] = rows.read(real)
        layout = rows.layout(real)
        filled = np.arange(len(real) + 1, size + 1, dtype=np.int64) * T
        masked_M = np.concatenate((layout.masked_M, np.arange(len(real) * T, size * T, dtype=np.int64)))
        samples_B = np.where(numbers < n, numbers, -1)
        yield Batch(step, samples_B, rows_BW, Layout(np.concatenate((layout.borders_S, filled)), masked_M))


def bytes_per_id(config: RunConfig) -> torch.Tensor:
    """int64 [V]: the UTF-8 bytes each id of the validation set stands for (0 for control ids).

    Raises ConfigError and DataError as `open_stream`.
    """
    return torch.from_numpy(open_shards(config, config.data.validation, "data.validation").bytes_per_id)


def unigram_bits_per_byte(config: RunConfig) -> float:
    """Bits per byte of the validation text under its own token frequencies: what a model without context can reach.

    Entropy of the counts c_v, sum of c_v log2(N / c_v), over the bytes of the text. Reads the whole validation set.
    Raises ConfigError and DataError as `open_stream`.
    """
    shards = open_shards(config, config.data.validation, "data.validation")
    if shards.manifest.text_bytes == 0:
        raise DataError("its tokens stand for no text", field="data.validation", value=config.data.validation)
    counts_V = shards.token_counts()
    used = counts_V[counts_V > 0].astype(np.float64)
    bits = float((used * np.log2(used.sum() / used)).sum())
    return bits / shards.manifest.text_bytes
