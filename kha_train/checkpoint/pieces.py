"""What a rank contributes to a checkpoint: flat fp32 fragments of the parameters it owns.

A piece does not depend on ranks or ZeRO stages: it has a name, the parameter's global shape, and the position of its
values in the flattened parameter. A parameter may be cut into pieces in any way.
"""

# P the elements of one piece

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`values` [P] (1-D, fp32, CPU) are the elements `start` .. `start + P` of the flattened parameter `name`.

    `kind` is "master" (the fp32 weights) or a state of the optimiser; `shape` is the global shape.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    def __post_init__(self) -> None:
        assert self.values.ndim == 1 and self.values.dtype == torch.float32 and self.values.device.type == "cpu", self
        assert 0 <= self.start and self.start + len(self.values) <= math.prod(self.shape), (self.name, self.start)
