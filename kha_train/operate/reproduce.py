"""Trains a capsule, which may come from other hands: it is checked before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from kha_train.checkpoint.layout import FOLDER
from kha_train.checkpoint.reader import Checkpoint, directory_of, verify
from kha_train.config.compose import from_plain
from kha_train.config.schema import RunConfig
from kha_train.engine.building import persistent_buffers
from kha_train.errors import CheckpointError
from kha_train.estimate.counts import count_parameters
from kha_train.model.decoder import lay_out_decoder
from kha_train.operate.capsule import CAPSULE_FILE, SAMPLES_FILE, CapsuleFile, Row, SamplesFile, shows, train_steps
from kha_train.record.files import read_json, size_of
from kha_train.stability.events import OPEN_Z


def is_capsule(path: Path) -> bool:
    """Whether `path` is the directory of a capsule."""
    return (path / CAPSULE_FILE).is_file()


def reproduce(path: Path) -> dict[str, Any]:
    """Train the steps of the capsule in `path`: the losses, those expected, whether they are equal to the last bit, and
    whether the event shows. Raises DataError and CheckpointError for a damaged capsule, ConfigError for settings that
    this release does not have.
    """
    found, samples = read_json(path / CAPSULE_FILE, CapsuleFile), read_json(path / SAMPLES_FILE, SamplesFile)
    if found is None or samples is None:
        raise CheckpointError("the capsule lacks a file", field=str(path), allowed=f"{CAPSULE_FILE}, {SAMPLES_FILE}")
    checkpoint = Checkpoint(directory_of(path), verify(directory_of(path)))
    config, saved = from_plain(found["config"]), checkpoint.buffers()
    for problem in _problems(found, samples["steps"], config, checkpoint):
        raise CheckpointError(f"the capsule is damaged: {problem}", field=str(path))
    losses = train_steps(
        config, checkpoint.kinds, checkpoint.read, saved.__getitem__, found["optimizer_steps"],
        samples["steps"], found["rates"],
    )  # fmt: skip
    first = found["step"] - len(losses) + 1
    return {
        "steps": list(range(first, found["step"] + 1)),
        "losses": losses,
        "expected": found["losses"],
        "equal": list(map(repr, losses)) == list(map(repr, found["losses"])),
        "threshold": found["baseline"] + OPEN_Z * found["scale"],
        "shows": shows(losses, found["baseline"], found["scale"]),
        "bytes": sum(size_of(file) for file in path.rglob("*") if FOLDER in file.parts or file.parent == path),
    }


def _problems(found: CapsuleFile, steps: list[list[Row]], config: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """What is wrong with a capsule. The size of its model is compared with its weights before the model is laid out."""
    if not 0 < len(steps) == len(found["rates"]) == len(found["losses"]):
        yield f"{len(steps)} steps, {len(found['rates'])} rates and {len(found['losses'])} losses"
    # An event that opened with a loss that is not finite may have no scale.
    if found["scale"] <= 0 or found["optimizer_steps"] < 0:
        yield f"scale {found['scale']}, optimizer_steps {found['optimizer_steps']}"
    if config.engine.name != "plain" or config.engine.compile != "none":
        yield f"engine.name={config.engine.name} engine.compile={config.engine.compile}"
    for number, rows in enumerate(steps, start=1):
        if not rows or not all(_is_row(row, config) for row in rows):
            yield f"the rows of its step {number} do not fit the model"
        if len({row["filled"] is None for row in rows}) > 1 or sum(_labels(row) for row in rows) <= 0:
            yield f"the rows of its step {number} have no labels, or only some have padding"
    shapes = checkpoint.names()
    if config.model.layers > len(shapes) or count_parameters(config).total > sum(map(math.prod, shapes.values())):
        yield "its model is larger than its weights"
        return
    decoder = lay_out_decoder(config)
    if {name: tuple(one.shape) for name, one in decoder.named_parameters()} != shapes:
        yield "its model has other parameters than its weights"
    saved = {name: values.shape for name, values in checkpoint.buffers().items()}
    if {name: values.shape for name, values in persistent_buffers(decoder).items()} != saved:
        yield "its model has other buffers than its state"


def _is_row(row: Row, config: RunConfig) -> bool:
    length, borders, masked = config.model.seq_len, row["borders"], row["masked"]
    return (
        len(row["ids"]) == length + 1
        and 0 <= min(row["ids"]) <= max(row["ids"]) < config.model.vocab_size
        and borders[:1] == [0]
        and borders[-1] == length
        and all(first < last for first, last in pairwise([-1, *borders]))
        and all(first < last for first, last in pairwise([-1, *masked, length]))
        and 0 <= (length if row["filled"] is None else row["filled"]) <= length
        and -1 <= row["sample"] < 2**63
    )


def _labels(row: Row) -> int:
    return len(row["ids"]) - 1 - len(row["masked"])
