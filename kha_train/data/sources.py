"""The datasets of a run, checked against its model, and the rows behind sample numbers.

`data.train` names one dataset; `data.sources` names several with weights, mixed by `mixture.Mixture`.
"""

# N samples  W = T + 1, a row with the label of its last token  M unmasked labels  V ids of the vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kha_train.config.home import in_home
from kha_train.config.schema import DataSection, RunConfig
from kha_train.data.format.canonical import canonical_sha256
from kha_train.data.format.shards import ShardSet
from kha_train.data.rows.best_fit import BestFitRows
from kha_train.data.rows.packing import ConcatRows, Layout
from kha_train.data.sampling.mixture import Mixture, Phase
from kha_train.data.sampling.order import SampleOrder
from kha_train.errors import ConfigError, DataError, Settings, either

TRAIN_SOURCE = "train"
_ROWS_AT_ONCE = 1024
_FEW_ROWS = 64
"""Rows of the validation set read at a time when searching for a label."""
Rows = ConcatRows | BestFitRows


class Place(NamedTuple):
    """Where a dataset lies, and the configuration key that says so."""

    path: str
    field: str


class Source(NamedTuple):
    """One dataset of a run: its name (part of the key of its order), its rows, and their order."""

    name: str
    rows: Rows
    order: SampleOrder


class Samples:
    """Global sample number -> row of a source -> ids. `sources` in their given order; `mixture` is None for one
    source.
    """

    def __init__(self, sources: Sequence[Source], mixture: Mixture | None, seq_len: int) -> None:
        self.sources, self.mixture, self.seq_len = tuple(sources), mixture, seq_len
        # The sources share a tokenizer, but not always an importer: the widest type holds the ids of all.
        self._dtype = np.result_type(*(source.rows.shards.dtype for source in self.sources))

    @property
    def content_id(self) -> str:
        """The id of the data: that of the one dataset, or SHA-256 over names and content ids of all sources."""
        if len(self.sources) == 1:
            return self.sources[0].rows.shards.content_id
        ids = [[source.name, source.rows.shards.content_id] for source in self.sources]
        return canonical_sha256(ids)

    @property
    def rows(self) -> int:
        """Total number of rows of all sources."""
        return sum(source.rows.rows for source in self.sources)

    @property
    def row_bytes(self) -> int:
        """Size in bytes of a row that was read."""
        return (self.seq_len + 1) * self._dtype.itemsize

    def locate(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of the source, row in it) of samples given in runs of consecutive numbers, both int64."""
        breaks = np.flatnonzero(np.diff(samples_N) != 1) + 1
        runs = [(int(run[0]), len(run)) for run in np.split(samples_N, breaks) if len(run)]
        if self.mixture is None:
            order = self.sources[0].order
            rows_N = np.concatenate([order.rows(first, count) for first, count in runs])
            return np.zeros(len(rows_N), dtype=np.int64), rows_N
        dealt = [self.mixture.samples(first, count) for first, count in runs]
        sources_N, numbers_N = (np.concatenate(column) for column in zip(*dealt, strict=True))
        rows_N = np.empty_like(numbers_N)
        for place, source in enumerate(self.sources):
            inside = np.flatnonzero(sources_N == place)
            if inside.size:
                # A source's own numbers are consecutive, but not ascending in the order of the mixture's slots.
                low, high = int(numbers_N[inside].min()), int(numbers_N[inside].max())
                rows_N[inside] = source.order.rows(low, high - low + 1)[numbers_N[inside] - low]
        return sources_N, rows_N

    @property
    def looks_ahead(self) -> bool:
        """Whether `expect` has an effect."""
        return any(source.rows.shards.looks_ahead for source in self.sources)

    def expect(self, plans: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Announce all upcoming located rows, plan by plan, in order."""
        for place, source in enumerate(self.sources):
            source.rows.expect([rows_N[sources_N == place] for sources_N, rows_N in plans])

    def layout(self, sources_N: np.ndarray, rows_N: np.ndarray) -> Layout:
        """Borders and masked labels of located rows. Raises DataError when document ends are damaged."""
        if len(self.sources) == 1:
            return self.sources[0].rows.layout(rows_N)
        borders, masked = [np.arange(len(rows_N) + 1, dtype=np.int64) * self.seq_len], []
        filled_N = None
        for place, source in enumerate(self.sources):
            inside = np.flatnonzero(sources_N == place)
            part = source.rows.layout(rows_N[inside])
            shift = (inside - np.arange(len(inside))) * self.seq_len
            borders.append(part.borders_S[:-1] + shift[part.borders_S[:-1] // self.seq_len])
            masked.append(part.masked_M + shift[part.masked_M // self.seq_len])
            if part.filled_N is not None:
                filled_N = np.full(len(rows_N), self.seq_len) if filled_N is None else filled_N
                filled_N[inside] = part.filled_N
        return Layout(np.unique(np.concatenate(borders)), np.sort(np.concatenate(masked)), filled_N)

    def read(self, sources_N: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
        """The ids of located rows, [N, T + 1] as stored. Raises DataError when they are damaged."""
        return next(self.read_in_parts(sources_N, rows_N, (0, len(rows_N))))

    def read_in_parts(self, sources_N: np.ndarray, rows_N: np.ndarray, bounds: Sequence[int]) -> Iterator[np.ndarray]:
        """As `read`, one part at a time as requested: part k has rows [bounds[k], bounds[k + 1])."""
        if len(self.sources) == 1:
            return self.sources[0].rows.read_in_parts(rows_N, bounds)
        return self._mixed_in_parts(sources_N, rows_N, bounds)

    def _mixed_in_parts(self, sources_N: np.ndarray, rows_N: np.ndarray, bounds: Sequence[int]) -> Iterator[np.ndarray]:
        own = []
        for place, source in enumerate(self.sources):
            inside = np.flatnonzero(sources_N == place)
            own_bounds = inside.searchsorted(bounds).tolist()
            own.append((inside, own_bounds, source.rows.read_in_parts(rows_N[inside], own_bounds)))
        for k, (first, last) in enumerate(pairwise(bounds)):
            yield self._put_together(
                last - first,
                [(inside[at[k] : at[k + 1]] - first, next(parts)) for inside, at, parts in own],
            )

    def _put_together(self, count: int, of_sources: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """`count` rows assembled from (positions, ids) of each source."""
        rows_NW = np.empty((count, self.seq_len + 1), dtype=self._dtype)
        for places, ids_NW in of_sources:
            rows_NW[places] = ids_NW
        return rows_NW


def open_samples(config: RunConfig) -> Samples:
    """The training data of `config`. Raises ConfigError and DataError as `stream.open_stream`."""
    named = _named(config.data)
    opened = [(name, open_rows(config, path, field)) for name, path, field in named]
    tokenizers = {rows.shards.manifest.tokenizer.sha256 for _, rows in opened}
    if len(tokenizers) > 1:
        raise ConfigError(
            "were made by different tokenizers", field="data.sources", value=[path for _, path, _ in named]
        )
    sources = [
        Source(name, rows, SampleOrder(rows.rows, seed=config.data_seed, source=name, shuffle=config.data.shuffle))
        for name, rows in opened
    ]
    mixture = None
    if config.data.sources:
        first = Phase(0, tuple(source.weight for source in config.data.sources))
        later = [Phase(phase.start_sample, phase.weights) for phase in config.data.phases]
        mixture = Mixture([first, *later], seed=config.data_seed)
    return Samples(sources, mixture, config.model.seq_len)


def validation_sets(config: RunConfig) -> dict[str, Place]:
    """Where each validation set lies, by its name: "" is `data.validation`, the others are `validation.sets`."""
    named = enumerate(config.validation.sets)
    further = {one.name: Place(one.path, f"validation.sets[{number}].path") for number, one in named}
    return {"": Place(config.data.validation, "data.validation"), **further}


def first_training_set(config: RunConfig) -> Place:
    """Where the training data lie, or the first of several sources."""
    _, path, field = _named(config.data)[0]
    return Place(path, field)


def open_validation(config: RunConfig, name: str = "", most_rows: int = 0) -> tuple[Rows, int]:
    """The rows of the validation set `name`, and how many of them are scored (the first ones): `most_rows`, or
    `validation.rows` if that is 0.

    Raises ConfigError and DataError as `stream.open_stream`; ConfigError when their tokenizer differs from that of the
    training data; DataError when no scored row has a label, or none with a label that stands for text.
    """
    place = validation_sets(config)[name]
    rows = open_rows(config, place.path, place.field)
    train = open_shards(config, *first_training_set(config)).manifest.tokenizer
    if rows.shards.manifest.tokenizer.sha256 != train.sha256:
        raise ConfigError(
            "was made by another tokenizer than data.train",
            field=place.field,
            value=place.path,
            fix="tokenize both with one tokenizer",
        )
    count = min(most_rows or config.validation.rows or rows.rows, rows.rows)
    has_text_V = np.asarray(train.bytes_per_id) > 0
    labelled = False
    for first in range(0, count, _ROWS_AT_ONCE):
        numbers = np.arange(first, min(first + _ROWS_AT_ONCE, count), dtype=np.int64)
        if len(rows.layout(numbers).masked_M) == len(numbers) * rows.seq_len:
            continue
        labelled = True
        # Without a table of bytes, ids are scored by their loss alone.
        if not has_text_V.any() or any(has_text_V[_labels(rows, few)].any() for few in _few_by_few(numbers)):
            return rows, count
    if labelled:
        problem = f"the labels of its {count} rows stand for no text: all are control ids"
        raise DataError(problem, field=place.field, fix="validate on text")
    raise without_labels(place.field, f"none of its {count} rows")


def _few_by_few(numbers: np.ndarray) -> list[np.ndarray]:
    """Row numbers in parts, the first row alone: it usually suffices."""
    return np.split(numbers, range(1, len(numbers), _FEW_ROWS))


def _labels(rows: Rows, numbers: np.ndarray) -> np.ndarray:
    """The unmasked labels of some rows."""
    labels_M = rows.read(numbers)[:, 1:].reshape(-1)
    return np.delete(labels_M, rows.layout(numbers).masked_M)


def begins_with_labels(config: RunConfig, samples: Samples) -> bool:
    """Whether the global batch of step 1 has a label. Raises DataError when document ends are damaged."""
    size = config.data.global_batch_size
    for first in range(0, size, _ROWS_AT_ONCE):
        numbers = np.arange(first, min(first + _ROWS_AT_ONCE, size), dtype=np.int64)
        if len(samples.layout(*samples.locate(numbers)).masked_M) < len(numbers) * samples.seq_len:
            return True
    return False


def without_labels(field: str, rows: str) -> DataError:
    """The error for `rows` (in words) of the dataset at `field` without anything to predict."""
    return DataError(
        f"{rows} has a label: each token is the last of its document, and no document predicts the next one's first",
        field=field,
        fix=either("use documents of two tokens or more", Settings("data.isolate_documents=false data.packing=concat")),
    )


def open_rows(config: RunConfig, directory: str, field: str) -> Rows:
    """The rows of one dataset; `field` is the key that named it. Raises ConfigError when none fits, and as
    `open_shards`."""
    shards = open_shards(config, directory, field)
    shape = (shards, config.model.seq_len, config.data.isolate_documents)
    cache = in_home(config.data.cache_dir)
    rows: Rows = ConcatRows(*shape) if config.data.packing == "concat" else BestFitRows(*shape, cache)
    if rows.rows == 0:
        longest = max(shard.tokens for shard in shards.manifest.shards)
        raise ConfigError(
            f"no row of this length in {field} ({directory})",
            field="model.seq_len",
            value=config.model.seq_len,
            allowed=f"at most {longest - 1}, one less than the tokens of the largest shard" if longest > 1 else None,
            code="E18",
        )
    return rows


def open_shards(config: RunConfig, directory: str, field: str) -> ShardSet:
    """A dataset that fits the model. Raises ConfigError when it is missing or has another vocabulary, DataError when it
    is damaged or its tokenizer does not match the manifest, and for a URL as `remote.open_remote`.
    """
    data = config.data
    shards = ShardSet.open(
        directory,
        check_crc=data.check_crc,
        reader=data.reader,
        field=field,
        cache=data.cache_dir,
        cache_gib=data.cache_gib,
        cache_readers=_cache_readers(data) if "://" in directory else 1,
    )
    if shards.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{field} ({directory}) was made with a vocabulary of {shards.vocab_size}",
            field="model.vocab_size",
            value=config.model.vocab_size,
            fix=either(Settings(f"model.vocab_size={shards.vocab_size}"), "other data"),
            code="E02",
        )
    shards.check_tokenizer()
    return shards


def _named(data: DataSection) -> list[tuple[str, str, str]]:
    """(name, path, configuration key) of each source."""
    if not data.sources:
        return [(TRAIN_SOURCE, data.train, "data.train")]
    return [(one.name, one.path, f"data.sources[{i}].path") for i, one in enumerate(data.sources)]


def _cache_readers(data: DataSection) -> int:
    """The number of readers that share the block cache of this node. A plan reads no URL, and needs no torch."""
    from kha_train.distributed import ranks_of_node

    return ranks_of_node() * max(1, sum("://" in source.path for source in data.sources))
