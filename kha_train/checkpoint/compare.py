"""Compares two checkpoints, whatever their layouts, with one parameter in memory at a time."""

# P elements of one parameter

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.build import flatten
from kha_train.foreign.documents import Json


@dataclass
class Differences:
    """The differences between two checkpoints. A nan equals a nan.

    `settings` holds both values of each entry of the trainer's state that differs, by dotted name. `tensors` holds the
    largest difference, and the norm of the difference relative to the norm of the first; both are infinite for buffers
    of different shapes. `only_first` and `only_second` list parameters and optimiser states that only one of them has.
    """

    settings: dict[str, tuple[Json, Json]] = field(default_factory=dict)
    tensors: dict[str, tuple[float, float]] = field(default_factory=dict)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.settings or self.tensors or self.only_first or self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"equal": self.equal, **vars(self)}


def compare(first: Checkpoint, second: Checkpoint) -> Differences:
    """Everything that differs between two checkpoints. Raises CheckpointError when a file is damaged."""
    found = Differences()
    left, right = flatten(first.trainer_state), flatten(second.trainer_state)
    for key in sorted(left.keys() | right.keys()):
        if not _same(left.get(key), right.get(key)):
            found.settings[key] = (left.get(key), right.get(key))
    shapes, others = first.names(), second.names()
    found.only_first = [name for name in shapes if shapes[name] != others.get(name)]
    found.only_second = [name for name in others if others[name] != shapes.get(name)]
    for name in sorted(shapes.keys() & others.keys() - set(found.only_first)):
        kept, others_kept = first.kinds_of(name), second.kinds_of(name)
        for kind in (kind for kind in kept if kind in others_kept):
            _add(found, f"{name} {kind}", first.read(name, kind), second.read(name, kind))
        # A kind that the other checkpoint lacks for every parameter is reported once, below.
        found.only_first += [f"{name} {kind}" for kind in kept if kind in second.kinds and kind not in others_kept]
        found.only_second += [f"{name} {kind}" for kind in others_kept if kind in first.kinds and kind not in kept]
    found.only_first += [f"every {kind}" for kind in first.kinds if kind not in second.kinds]
    found.only_second += [f"every {kind}" for kind in second.kinds if kind not in first.kinds]
    buffers, more = first.buffers(), second.buffers()
    for name in sorted(buffers.keys() & more.keys()):
        if buffers[name].shape != more[name].shape:
            found.tensors[name] = (float("inf"), float("inf"))
        else:
            _add(found, name, buffers[name].flatten(), more[name].flatten())
    found.tensors = dict(sorted(found.tensors.items()))
    return found


def _same(left: Json, right: Json) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return both_nan or left == right


def _add(found: Differences, name: str, first_P: Tensor, second_P: Tensor) -> None:
    alike_P = (first_P == second_P) | (first_P.isnan() & second_P.isnan())
    if alike_P.all():
        return
    # Infinities of one sign are alike too; their difference would be nan.
    difference_P = (first_P.double() - second_P.double()).abs().masked_fill(alike_P, 0.0)
    norm = first_P.double().norm().item()
    found.tensors[name] = (difference_P.max().item(), difference_P.norm().item() / norm if norm else float("inf"))
