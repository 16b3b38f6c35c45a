"""The text of the batch in which an event began, read from the run's own data."""

# N samples of the batch  W tokens of a row and the one after it

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.config.compose import from_plain, load
from kha_train.data.sampling.skipping import Window, merged, numbers_past
from kha_train.data.sources import open_samples
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_kinds import dataset_tokenizer
from kha_train.errors import DataError
from kha_train.record import config_of, read_attempts, read_discarded, read_events
from kha_train.record.actions import skip_windows
from kha_train.record.columns_twin import read_columns


def batch_texts(run_dir: Path, step: int, first_sample: int, attempt: int | None = None) -> list[dict[str, Any]]:
    """`sample`, `source` and `text` of every row of the global batch of `step`, which begins with `first_sample`, as
    `attempt` read it; by default the attempt of the last line that begins with it.

    Shows ids when the dataset has no tokenizer. Raises ConfigError and DataError when the data is no longer what the
    run was trained on.
    """
    attempts = read_attempts(run_dir)
    number = _attempt_of(run_dir, first_sample) if attempt is None else attempt
    saved = config_of(attempts, number)
    config = from_plain(saved) if saved else load(run_dir / "config.yaml")
    samples = open_samples(config)
    content_id = attempts[number].facts.get("data_content_id") if number in attempts else None
    if content_id not in (None, samples.content_id):
        problem = f"not the data that the step read: expected content id {content_id}, found {samples.content_id}"
        raise DataError(
            problem, field="data.train", value=config.data.train, fix="restore the data that the run was trained on"
        )
    windows = [*config.data.skip_windows, *skip_windows(read_events(run_dir))]
    numbers_N = batch_numbers(first_sample, config.data.batch_sizes.of(step), windows)
    sources_N, rows_N = samples.locate(numbers_N)
    rows_NW = samples.read(sources_N, rows_N)
    tokenizers = [dataset_tokenizer(source.rows.shards) for source in samples.sources]
    return [
        {"sample": int(number), "source": samples.sources[place].name, "text": _decode(tokenizers[place], ids_W[:-1])}
        for number, place, ids_W in zip(numbers_N, sources_N, rows_NW, strict=True)
    ]


def batch_numbers(first_sample: int, count: int, windows: Iterable[Window]) -> np.ndarray:
    """The sample numbers (int64) of the batch of `count` that begins with `first_sample`, without skip `windows`.

    A window that holds the first sample was created later, because of this batch, and does not count.
    """
    earlier = merged((first, last) for first, last in windows if not first <= first_sample < last)
    return numbers_past(earlier, first_sample, count)


def _attempt_of(run_dir: Path, first_sample: int) -> int | None:
    columns = read_columns(run_dir)
    began = np.flatnonzero(columns["samples_first"] == first_sample)
    if len(began):
        return int(columns["attempt"][began[-1]]) if columns.has("attempt")[began[-1]] else None
    undone = [line.get("attempt") for line in read_discarded(run_dir) if line.get("samples_first") == first_sample]
    return undone[-1] if undone else None


def _decode(tokenizer: Tokenizer | None, ids_W: np.ndarray) -> str:
    return tokenizer.decode(ids_W) if tokenizer else " ".join(map(str, ids_W.tolist()))
