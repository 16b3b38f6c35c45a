"""Averages checkpoints of one model, of one run or of several, tensor by tensor, into a new run of weights alone.

Recipes without an anneal average the last checkpoints of a run at a constant rate. Weights are averaged: parameters,
matrices that were not trained, and the biases that select experts, which are added to scores that are averaged too.
What a router has counted is a run's state and not a weight: the new run gets that of the last checkpoint given.
"""

# P the elements of one piece

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kha_train.checkpoint import layout
from kha_train.checkpoint.manifest import manifest_sha256
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, open_verified
from kha_train.checkpoint.weights import write_weights
from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import dump, from_plain
from kha_train.config.constants import ROUNDING, WITHOUT_EFFECT, may_differ
from kha_train.config.saved import completed
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError
from kha_train.model.moe.router import RUN_STATE
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.files import published, write_json, write_text
from kha_train.record.imported import copy_imported
from kha_train.variants.optimizer import MASTER

MERGED = "merged.json"
"""The file of a merged run that says what it is the average of."""
PIECE_ELEMENTS = 1 << 24
_OF_THE_MODEL = ("model.", "attention.", "moe.")
_OF_TRAINING = (
    "moe.bias_update", "moe.bias_update_rate", "moe.auxiliary_loss.", "moe.z_loss_weight", "moe.routing_seed",
    "moe.routing_warmup_steps",
)  # fmt: skip
"""Settings of these sections that decide how a model is trained, not what it computes."""


@dataclass(frozen=True)
class Merged:
    """The new run and its checkpoint, the directories of the averaged checkpoints with their steps and the SHA-256 of
    their manifests, their shares of the average, and the buffers that are those of the last one.
    """

    run: Path
    checkpoint: Path
    sources: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]
    parameters: int
    taken_from_the_last: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "run": str(self.run),
            "checkpoint": str(self.checkpoint),
            "sources": list(self.sources),
            "weights": list(self.weights),
            "parameters": self.parameters,
            "taken_from_the_last": list(self.taken_from_the_last),
        }


def sources_of(paths: Sequence[Path], last: int) -> list[Path]:
    """The checkpoints that `paths` name, oldest first within a run: a step directory itself, of a run directory its
    `last` newest. Raises ConfigError for a run that has fewer.
    """
    found: list[Path] = []
    for path in paths:
        newest = layout.candidates(path / layout.FOLDER)
        if not newest:
            found.append(path)
        elif len(newest) < last:
            raise ConfigError(
                "the run has fewer checkpoints", field="--last", value=last, allowed=f"1 to {len(newest)}"
            )
        else:
            found += [directory for _, directory in newest[last - 1 :: -1]]
    return found


def merge(paths: Sequence[Path], weights: Sequence[float], out: Path, advance: Callable[[int], None]) -> Merged:
    """Write the run `out` with the average of the checkpoints in `paths`, by `weights` divided by their sum (empty: all
    alike). Sums are fp64. `advance` gets the number of numbers that were written.

    Raises ConfigError for checkpoints of different models, for weights that give no average, and where `out` holds
    something; CheckpointError for a damaged checkpoint and for numbers that are not finite; OSError.
    """
    shares = _shares(weights, len(paths))
    world = World.single()
    with ExitStack() as hold:
        checkpoints = [open_verified(path, world, hold) for path in paths]
        _check_alike(checkpoints)
        values = completed(checkpoints[-1].trainer_state.get("config", {}))
        config = from_plain(values)
        config = replace(config, run=replace(config.run, dir=str(out), init_from="", branch_from=""))
        average = _Average(checkpoints, shares)
        with published(out, "--out") as beside:
            place = write_weights(beside, to_plain(config), average.pieces(advance), average.buffers())
            write_text(beside / CONFIG_FILE, dump(config))
            made = Merged(
                out,
                out / place.relative_to(beside),
                tuple(map(_named, checkpoints)),
                shares,
                sum(math.prod(shape) for shape in checkpoints[0].names().values()),
                tuple(name for name in checkpoints[-1].buffers() if _is_state(name)),
            )
            write_json(beside / MERGED, made.to_plain())
            copy_imported(layout.run_of(checkpoints[-1].path), beside)
    return made


class _Average:
    """The average of `checkpoints` by `shares`, one part of a tensor at a time."""

    def __init__(self, checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> None:
        self._checkpoints, self._shares = checkpoints, shares

    def pieces(self, advance: Callable[[int], None]) -> Iterator[Piece]:
        """The masters of every parameter."""
        for name, shape in self._checkpoints[0].names().items():
            elements = math.prod(shape)
            for start in range(0, max(1, elements), PIECE_ELEMENTS):
                length = min(PIECE_ELEMENTS, elements - start)
                parts = (checkpoint.read(name, MASTER, start, length) for checkpoint in self._checkpoints)
                yield Piece(name, MASTER, shape, start, self._mean(name, parts))
                advance(length)

    def buffers(self) -> dict[str, Tensor]:
        """Every buffer: averaged, or that of the last checkpoint."""
        every = [checkpoint.buffers() for checkpoint in self._checkpoints]
        return {
            name: last if _is_state(name) else self._mean(name, (buffers[name] for buffers in every))
            for name, last in every[-1].items()
        }

    def _mean(self, name: str, values: Iterator[Tensor]) -> Tensor:
        """The weighted mean of tensors of one shape, fp32."""
        total: Tensor | None = None
        for share, one in zip(self._shares, values, strict=True):
            weighted = one.double() * share
            total = weighted if total is None else total.add_(weighted)
        assert total is not None, "there are at least two checkpoints"
        mean = total.float()
        if not torch.isfinite(mean).all():
            places = ", ".join(str(checkpoint.path) for checkpoint in self._checkpoints)
            raise CheckpointError("the average is not finite", field=name, value=places, fix="leave out what diverged")
        return mean


def _is_state(buffer: str) -> bool:
    return buffer.rpartition(".")[2] in RUN_STATE


def _shares(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The share of each checkpoint. Raises ConfigError."""
    if count < 2:
        raise ConfigError(
            "an average needs two checkpoints", field="SOURCE", value=count, fix="name more, or use --last"
        )
    if weights and len(weights) != count:
        raise ConfigError("one weight for each checkpoint", field="--weights", value=len(weights), allowed=str(count))
    given = tuple(weights) or (1.0,) * count
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not 0 < math.fsum(given) < math.inf:
        raise ConfigError("give no average", field="--weights", value=list(given), allowed="numbers from 0, not all 0")
    return tuple(weight / math.fsum(given) for weight in given)


def _check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises ConfigError unless all checkpoints are of one model: the same settings, parameters and buffers."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for what, one, two in (
            ("setting", _settings(first), _settings(other)),
            ("parameter", first.names(), other.names()),
            ("buffer", _shapes(first), _shapes(other)),
        ):
            different = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
            if different:
                name = different[0]
                raise ConfigError(
                    f"checkpoints of different models: the {what} {name} is {one.get(name)} in {first.path} and "
                    f"{two.get(name)} in {other.path}",
                    field="SOURCE",
                    allowed="checkpoints of one model",
                )


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the model computes, by dotted keys."""
    free = (*ROUNDING, *WITHOUT_EFFECT, *_OF_TRAINING)
    flat = flatten(completed(checkpoint.trainer_state.get("config", {})))
    return {key: flat[key] for key in flat if key.startswith(_OF_THE_MODEL) and not may_differ(key, free)}


def _shapes(checkpoint: Checkpoint) -> Mapping[str, Any]:
    entries = checkpoint.manifest.contents.buffers
    return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    sha256 = manifest_sha256(checkpoint.path) or ""
    return {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "manifest": sha256}
