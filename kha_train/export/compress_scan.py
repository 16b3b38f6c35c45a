"""`kha compress --scan`: what compression of each layer, and of groups of layers, costs a trained model in every task.

Nothing is written. Each point is the model with some layers compressed, scored on the same rows as the model itself:
validation and its named sets, loss by context, recall of repeated ids by distance, and the run's own tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.decode.absorb import absorb
from kha_train.decode.generate import materialise
from kha_train.decode.virtual_heads import compress, compressed_config
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.estimate.counts import cache_bytes_per_token
from kha_train.evaluate.contract import Task
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.scoring import evaluate
from kha_train.export.compress import Bar, heads_by_layer, layers_named, open_source
from kha_train.model.decoder import Decoder, DecoderOutput
from kha_train.model.host import inputs_of
from kha_train.variants.task import ContextOptions, RepeatsOptions, RowTaskOptions, TaskOptions

GROUPS = ("middle", "deep", "all")
BORDERS = (1, *(4**power for power in range(2, 16)))
"""Fewest tokens of context of the buckets of a scan."""


@dataclass(frozen=True)
class Point:
    """A model with some `layers` (in words, as `--layers` takes them) compressed to `kv_heads`: the numbers per token
    in its cache, and its `scores`, by the names of entries of the record.
    """

    layers: str
    kv_heads: int
    cache_numbers: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Scan:
    """What was scored: the checkpoint, rows of each task, the model as it is and with layers compressed."""

    source: str
    step: int
    rows: int
    whole: Point
    points: tuple[Point, ...]

    def to_plain(self) -> dict[str, Any]:
        """As plain values. A point has its `scores`, and by how much each rose as `rise`."""
        points = [asdict(point) | {"rise": self.rises(point)} for point in self.points]
        return {**asdict(self), "points": points}

    def rises(self, point: Point) -> dict[str, float]:
        """By how much each score of `point` is above that of the whole model."""
        return {name: value - self.whole.scores[name] for name, value in point.scores.items()}


class _Scorer:
    """A decoder that tasks can ask."""

    def __init__(self, decoder: Decoder, asked: Callable[[], None]) -> None:
        self.world, self._decoder, self._asked = World.single(), decoder.eval(), asked

    @torch.no_grad()
    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `Scorer.evaluate`."""
        self._asked()
        output: DecoderOutput = self._decoder(*inputs_of(batch, torch.device("cpu")), by_token=by_token)
        return output


def scan(source: Path, kv_heads: Sequence[int], rows: int, bar: Bar) -> Scan:
    """Score the model at `source` (a run or a checkpoint), and with each layer by itself, the middle, the deep and all
    layers compressed to each of `kv_heads` (none: half of the heads). At most `rows` rows of each set are scored.

    Raises ConfigError where the model cannot be compressed so, and as `open_source` and `open_tasks`.
    """
    config, checkpoint = open_source(source)
    layers = config.model.layers
    counts = tuple(kv_heads) or (max(1, config.attention.heads().kv_heads // 2),)
    wanted = [(text, count) for count in counts for text in _choices(layers)]
    for text, count in wanted:
        compressed_config(config, heads_by_layer(config, layers_named(text, layers), count))
    tasks = open_tasks(_measuring(config, rows))
    # Compressed once for all points: the weights of one layer at a time change.
    decoder = absorb(materialise(config, checkpoint, torch.device("cpu")))
    forwards = sum(1 for task in tasks for _ in task.batches(0, 1)) * (1 + len(wanted))
    with bar(f"scanning {checkpoint.path}", forwards) as advance:

        def scored(text: str, count: int, model: Decoder) -> Point:
            scores = _scores(model, tasks, lambda: advance(1))
            return Point(text, count, cache_bytes_per_token(model.config, 1), scores)

        whole = scored("", config.attention.heads().kv_heads, decoder)
        points = [
            scored(text, count, compress(decoder, heads_by_layer(config, layers_named(text, layers), count)))
            for text, count in wanted
        ]
    return Scan(str(checkpoint.path), checkpoint.step, rows, whole, tuple(points))


def _choices(layers: int) -> Iterator[str]:
    """Each layer, and the groups that there are in so many layers."""
    yield from map(str, range(layers))
    for group in GROUPS:
        try:
            several = len(layers_named(group, layers)) > 1
        except ConfigError:
            continue
        if several:
            yield group


def _measuring(config: RunConfig, rows: int) -> RunConfig:
    """`config` with the tasks of a scan, each limited to `rows` rows."""
    own = [_limited(task, rows) for task in config.evaluation.tasks]
    labels = {task.entries for task in own}
    # The default's last bucket may hold the last label of a row alone.
    borders = tuple(border for border in BORDERS if border < config.model.seq_len)
    added = (ContextOptions(name="context", rows=rows, borders=borders), RepeatsOptions(name="repeats"))
    tasks = (*own, *(task for task in added if task.entries not in labels))
    return replace(
        config,
        validation=replace(config.validation, rows=rows),
        evaluation=replace(config.evaluation, tasks=tasks),
    )


def _limited(task: TaskOptions, rows: int) -> TaskOptions:
    return replace(task, rows=min(task.rows or rows, rows)) if isinstance(task, RowTaskOptions) else task


def _scores(decoder: Decoder, tasks: Sequence[Task[TaskOptions]], asked: Callable[[], None]) -> dict[str, float]:
    return evaluate(_Scorer(decoder, asked), tasks)
