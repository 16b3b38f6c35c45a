"""Inspects what a model is trained on: lengths of documents, and the exact samples of a step."""

# B rows  W tokens of a row and the one after  S segment borders  N samples

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from kha_train.config.schema import RunConfig
from kha_train.data.format.shards import ShardSet
from kha_train.data.tokenizer_kinds import dataset_tokenizer
from kha_train.errors import ConfigError, DataError

BORDER = "\u2016"


def decoder_of(shards: ShardSet) -> Callable[[np.ndarray], str]:
    """A function from ids to text with the dataset's own tokenizer, or to the names of ids in the manifest of a
    synthetic task, or to the ids themselves if there are neither. Raises as `dataset_tokenizer`.
    """
    if tokenizer := dataset_tokenizer(shards):
        return lambda ids: tokenizer.decode(ids.tolist())
    names = str(shards.manifest.corpus.get("tokens", "")).split()
    if len(names) == shards.manifest.tokenizer.vocab:
        return lambda ids: " ".join(names[number] for number in ids.tolist())
    return lambda ids: " ".join(map(str, ids.tolist()))


def digest(ids: np.ndarray) -> str:
    """SHA-256 of ids as little-endian int64; independent of their stored width."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def length_histogram(shards: ShardSet) -> dict[str, int]:
    """The number of documents with 1, 2-3, 4-7, ... tokens. Raises DataError when the document ends are damaged."""
    counts: dict[int, int] = {}
    for lengths in shards.document_lengths():
        found, numbers = np.unique(np.floor(np.log2(lengths)).astype(int), return_counts=True)
        for power, number in zip(found.tolist(), numbers.tolist(), strict=True):
            counts[power] = counts.get(power, 0) + number
    powers = range(min(counts), max(counts) + 1)
    return {f"{1 << power}-{(2 << power) - 1}": counts.get(power, 0) for power in powers}


def samples_of_step(
    config: RunConfig,
    *,
    step: int,
    samples_first: int,
    samples_last: int,
    skip_windows: Iterable[tuple[int, int]] = (),
    content_id: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Any]]:
    """The rows that `step` trained on (the part of `rank` of `world_size`): sample number, source, SHA-256 of its ids,
    text with document borders. `skip_windows` are those recorded by the run, `content_id` identifies the data it read.
    Raises ConfigError when the step's numbers follow neither with nor without the windows, DataError when the data have
    changed, and both as `open_stream`.
    """
    from kha_train.data.stream import open_stream  # imports torch, which statistics of a dataset do not need

    # Borders are shown even if the model ignored them; the rows are the same.
    config = replace(config, data=replace(config.data, isolate_documents=True))
    jumped = samples_last - samples_first + 1 != config.data.batch_sizes.of(step)
    stream = open_stream(
        config,
        rank,
        world_size,
        samples_seen=samples_first,
        steps_done=step - 1,
        skip_windows=skip_windows if jumped else (),
    )
    if content_id is not None and stream.content_id != content_id:
        problem = f"not the data that the run read: expected content id {content_id}, found {stream.content_id}"
        raise DataError(
            problem, field="data.train", value=config.data.train, fix="restore the data that the run was trained on"
        )
    batch = next(stream)
    if stream.samples_seen - 1 != samples_last:
        raise ConfigError(
            f"{config.data.batch_sizes.of(step)} samples from there end at {stream.samples_seen - 1}",
            field="step",
            value=(samples_first, samples_last),
            fix="config.yaml, metrics.jsonl and events.jsonl must be of one run",
        )
    sources_N, rows_N = stream.samples.locate(batch.samples_B)
    decoders = [decoder_of(source.rows.shards) for source in stream.samples.sources]
    T = config.model.seq_len
    for j, number in enumerate(batch.samples_B.tolist()):
        source = int(sources_N[j])
        ids = batch.rows_BW[j, :-1]
        borders_S = batch.layout.borders_S
        inside = borders_S[(borders_S > j * T) & (borders_S < (j + 1) * T)] - j * T
        yield {
            "sample": number,
            "source": stream.samples.sources[source].name,
            "row": int(rows_N[j]),
            "sha256": digest(ids),
            "text": BORDER.join(decoders[source](part) for part in np.split(ids, inside)),
        }
