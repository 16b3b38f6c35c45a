"""From a configuration to batches: sources -> sample order -> rows -> packed batches with document borders.

A step takes the next `data.global_batch_size` (or as many as `data.batch_schedule` says) sample numbers outside skip
windows; rank r of R takes the r-th of R contiguous slices. `sources.Samples` maps a number to a row of a dataset and
reads it. The samples of a step do not depend on world size, micro-batch or accumulation. The state of a stream is the
number of steps taken, the next sample number and the skip windows.
"""

# B rows of this rank  G rows of all ranks  T tokens of a row (`model.seq_len`)  W = T + 1  V vocabulary
# S steps of one size  N samples of a plan
# M masked places of the flattened rows

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from kha_train.config.batch_sizes import BatchSizes
from kha_train.config.schema import RunConfig
from kha_train.data.ahead import InOrder
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.data.sampling.skipping import Window, merged, numbers_past
from kha_train.data.sources import Rows, Samples, open_samples, open_shards, open_validation, validation_sets
from kha_train.errors import ConfigError, DataError
from kha_train.metric import Metric

_PLANNED_ROWS = 1024
"""Number of rows planned per call, because a call has a fixed cost."""
_READ_BYTES = 5 << 16
"""Small steps are read together, up to this many bytes: a call has a fixed cost here too, and more would not stay in a
core's second-level cache until it is widened.
"""


class _Place(NamedTuple):
    """Where a stream stands: steps taken, and the sample number at which the next one begins."""

    steps: int
    sample: int


class _Plan(NamedTuple):
    """Consecutive steps of one rank and of one size, located but not read.

    Step s begins at `places[s]` and ends before `places[s + 1]`.
    """

    places: list[_Place]
    samples_SB: np.ndarray
    sources_N: np.ndarray
    rows_N: np.ndarray
    layouts: list[Layout]


_Ready = tuple[_Place, _Place, Batch]
"""The place at which a step begins, that of the next step, and the step's batch."""


METRICS = (
    Metric("data/wait_seconds", "s", "part of the step spent waiting for rank 0's own batch", timing=True),
    Metric("data/padding", "fraction", "places of the global batch that hold no token (packing=best_fit, if any)"),
)


class TokenStream:
    """An endless iterator of one rank's `Batch` for each optimiser step, made by `open_stream`.

    Batches hold `part` of their rows, see `Batch`. The state, the same on every rank: `samples_seen`, the next global
    sample number, `steps_done`, the steps before it, and `skip_windows`, the numbers [first, last) never to be trained
    on. They may be set at any time between steps. The size of a step follows from `steps_done`, the rows in it from
    `samples_seen`. `content_id` identifies the data; `samples_per_epoch` and `tokens_per_epoch` are its size in rows
    and in tokens of those rows. With `data.prefetch` a thread reads that many steps ahead. If a step, or one planned
    and read with it, meets damage, `next()` raises DataError and leaves the state unchanged.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_sizes: BatchSizes,
        rank: int,
        world_size: int,
        prefetch: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.samples = samples
        self.content_id = samples.content_id
        self.samples_per_epoch = samples.rows
        self.tokens_per_epoch = samples.rows * samples.seq_len
        self._sizes, self._prefetch, self._part = batch_sizes, prefetch, part
        self._rank, self._world_size = rank, world_size
        self._reader = InOrder("data-prefetch") if prefetch else None
        self._ahead: deque[Future[deque[_Ready]]] = deque()
        self._waited = 0.0
        self._place = _Place(0, 0)
        self._skip_windows: tuple[Window, ...] = ()
        self._groups = self._groups_from(self._place)
        self._batches: deque[_Ready] = deque()

    @property
    def samples_seen(self) -> int:
        """The global sample number at which the next step begins."""
        return self._place.sample

    @samples_seen.setter
    def samples_seen(self, number: int) -> None:
        self._place = self._place._replace(sample=number)
        self._begin()

    @property
    def steps_done(self) -> int:
        """The number of steps before the next one, which decides its size."""
        return self._place.steps

    @steps_done.setter
    def steps_done(self, number: int) -> None:
        self._place = self._place._replace(steps=number)
        self._begin()

    @property
    def skip_windows(self) -> tuple[Window, ...]:
        """Sample numbers [first, last) to skip, ascending and disjoint."""
        return self._skip_windows

    @skip_windows.setter
    def skip_windows(self, windows: Iterable[Window]) -> None:
        self._skip_windows = merged(windows)
        self._begin()

    def __iter__(self) -> TokenStream:
        return self

    def take_wait_seconds(self) -> float:
        """Seconds spent inside `next()` since the last call; resets the counter."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def __next__(self) -> Batch:
        while not self._batches or self._batches[0][0] != self._place:
            self._refill()
        _, following, batch = self._batches.popleft()
        self._place = following
        return batch

    def _refill(self) -> None:
        started = time.perf_counter()
        if self._batches:
            # An interrupt came between taking a batch and counting it; it may have been the last of its group.
            self._begin()
        try:
            self._batches = self._read_ahead(self._reader) if self._reader else next(self._groups)
        finally:
            self._waited += time.perf_counter() - started
            if not self._batches:
                # An interrupted generator is exhausted, but this stream is endless.
                self._begin()

    def _begin(self) -> None:
        """Discard what was planned and read: the next step begins where the stream stands."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._groups = self._groups_from(self._place)
        self._batches = deque()

    def _read_ahead(self, reader: InOrder) -> deque[_Ready]:
        """The next steps, planned and read in the thread; at least `data.prefetch` further steps are under way."""
        groups = self._groups
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(reader.submit(lambda: next(groups)))
        return self._ahead.popleft().result()

    def _groups_from(self, place: _Place) -> Iterator[deque[_Ready]]:
        """All steps from `place` on, endlessly, with some neighbours read together. The first plan has one step and
        each later one twice as many, so that a jump responds at once.
        """
        most = 1
        while True:
            plan = self._plan(place, most)
            count, B = plan.samples_SB.shape
            most_read = max(1, _READ_BYTES // (B * self.samples.row_bytes))
            firsts = [*range(0, count, most_read), count]
            parts = self.samples.read_in_parts(plan.sources_N, plan.rows_N, [B * first for first in firsts])
            for first, last in pairwise(firsts):
                yield self._group(plan, first, last, next(parts))
            place, most = plan.places[-1], 2 * count

    def _group(self, plan: _Plan, first: int, last: int, rows_NW: np.ndarray) -> deque[_Ready]:
        """Steps [first, last) of a plan, with their rows read."""
        rows_SBW = rows_NW.reshape(last - first, -1, rows_NW.shape[1])
        batch = partial(Batch, part=self._part)
        batches = map(batch, plan.samples_SB[first:last], rows_SBW, plan.layouts[first:last])
        return deque(zip(plan.places[first:last], plan.places[first + 1 :], batches, strict=False))

    def _plan(self, place: _Place, most: int) -> _Plan:
        """The steps from `place` on that have one size, `most` at most."""
        places, samples_SB = self._located(place, most)
        if self.samples.looks_ahead:
            _, later_SB = self._located(places[-1], most)
            self.samples.expect([self.samples.locate(some.reshape(-1)) for some in (samples_SB, later_SB)])
        sources_N, rows_N = self.samples.locate(samples_SB.reshape(-1))
        layouts = self.samples.layout(sources_N, rows_N).parts(samples_SB.shape[1], self.samples.seq_len)
        return _Plan(places, samples_SB, sources_N, rows_N, list(layouts))

    def _located(self, place: _Place, most: int) -> tuple[list[_Place], np.ndarray]:
        """Where the steps from `place` on that have one size begin, `most` at most, and the one after them; and this
        rank's sample numbers in each.
        """
        stretch = self._sizes.stretch_of(place.steps + 1)
        own = stretch.rows // self._world_size
        count = int(min(most, max(1, _PLANNED_ROWS // own), stretch.last - place.steps))
        numbers_SG = numbers_past(self._skip_windows, place.sample, count * stretch.rows).reshape(count, -1)
        ends = enumerate((numbers_SG[:, -1] + 1).tolist(), place.steps + 1)
        places = [place, *(_Place(steps, sample) for steps, sample in ends)]
        return places, numbers_SG[:, self._rank * own : (self._rank + 1) * own]


def open_stream(
    config: RunConfig,
    rank: int = 0,
    world_size: int = 1,
    *,
    samples_seen: int = 0,
    steps_done: int = 0,
    skip_windows: Iterable[Window] = (),
) -> TokenStream:
    """The training batches of `rank`, beginning at global sample `samples_seen` after `steps_done` steps, without
    `data.skip_windows` and the further `skip_windows`.

    Groups of `engine.context_parallel` ranks share their rows, each a part of every row; a single process reads whole
    rows. Raises ConfigError when a dataset is missing, too small for one row, or made by another tokenizer or
    vocabulary, or when a global batch does not divide by the number of groups; DataError when it is damaged.
    """
    batch_sizes, parts = config.data.batch_sizes, config.engine.context_parallel if world_size > 1 else 1
    groups = world_size // parts
    for stretch in batch_sizes.stretches():
        if stretch.rows % groups:
            raise ConfigError(
                f"does not divide by the number of processes, {groups}",
                field="data.global_batch_size" if stretch.first == 1 else "data.batch_schedule",
                value=stretch.rows,
                allowed=f"a multiple of {groups}",
                code="E07",
            )
    samples = open_samples(config)
    stream = TokenStream(
        samples,
        batch_sizes=batch_sizes,
        rank=rank // parts,
        world_size=groups,
        prefetch=config.data.prefetch,
        part=(rank % parts, parts),
    )
    stream.samples_seen, stream.steps_done = samples_seen, steps_done
    stream.skip_windows = (*config.data.skip_windows, *skip_windows)
    return stream


def validation_batches(config: RunConfig, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The batches of a `ValidationSet` opened for this call. Raises as `ValidationSet`."""
    return ValidationSet(config).batches(rank, world_size)


class ValidationSet:
    """A validation set, opened and checked once; `batches` may be called any number of times.

    `name` is one of `validation.sets`, or "" for `data.validation`; `field` is the key that says where it lies.
    `shards` is the dataset, `bytes_per_id_V` (int64) the number of UTF-8 bytes of each id. The first `scored_rows` rows
    are scored: `most_rows`, or `validation.rows` if that is 0.

    Raises ConfigError and DataError as `open_stream`; ConfigError when its tokenizer differs from that of the training
    data; DataError when no row has a label.
    """

    def __init__(self, config: RunConfig, name: str = "", most_rows: int = 0) -> None:
        self.field = validation_sets(config)[name].field
        self._rows, self.scored_rows = open_validation(config, name, most_rows)
        self.shards = self._rows.shards
        self.bytes_per_id_V = torch.from_numpy(self.shards.bytes_per_id)
        self._size = config.engine.micro_batch_size

    def batches(self, rank: int, world_size: int, parts: int = 1) -> Iterator[Batch]:
        """Rows 0 ... n-1 in order, n = `scored_rows`.

        Micro-batches of `engine.micro_batch_size` rows are assigned to the ranks in turn, or to groups of `parts`
        consecutive ranks, each of which has a part of every row. Every rank gets the same number of batches of the same
        shape; rows beyond n are fillers (sample -1, all labels masked). Raises DataError while reading.
        """
        place, part = (rank // parts, world_size // parts), (rank % parts, parts)
        return _deal(self._rows, self.scored_rows, self._size, place, part)


def _deal(rows: Rows, n: int, size: int, place: tuple[int, int], part: tuple[int, int]) -> Iterator[Batch]:
    T, (group, groups) = rows.seq_len, place
    for first in range(0, n, size * groups):
        numbers = np.arange(first + group * size, first + (group + 1) * size, dtype=np.int64)
        real = numbers[numbers < n]
        rows_BW = np.zeros((size, T + 1), dtype=rows.shards.dtype)
        rows_BW[: len(real)] = rows.read(real)
        layout = rows.layout(real)
        filled = np.arange(len(real) + 1, size + 1, dtype=np.int64) * T
        masked_M = np.concatenate((layout.masked_M, np.arange(len(real) * T, size * T, dtype=np.int64)))
        filled_B = None
        if len(real) < size or layout.filled_N is not None:
            filled_B = np.zeros(size, dtype=np.int64)
            filled_B[: len(real)] = T if layout.filled_N is None else layout.filled_N
        samples_B = np.where(numbers < n, numbers, -1)
        whole = Layout(np.concatenate((layout.borders_S, filled)), masked_M, filled_B)
        yield Batch(samples_B, rows_BW, whole, part=part)


def bytes_per_id(config: RunConfig) -> torch.Tensor:
    """int64 [V]: the number of UTF-8 bytes of each id of the validation set (0 for control ids).

    Raises ConfigError and DataError as `open_stream`.
    """
    return torch.from_numpy(open_shards(config, config.data.validation, "data.validation").bytes_per_id)


def unigram_bits_per_byte(config: RunConfig) -> float:
    """Bits per byte of the validation text under its own token frequencies: the best that a model without context can
    reach.

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
