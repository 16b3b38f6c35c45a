"""What is inserted into one projection: modules that change heads [B, T, H, K] -> [B, T, H, K].

Each starts as the identity, bit for bit, except the norm of MEA and the output gate. Parameters are used only inside
the forward of the module that owns them, because sharded engines gather them there, and are cast to the dtype of the
heads.
"""

# B batch   T tokens, or any other leading dimensions in place of both   H heads   K head width   D model width

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .layouts import Piece
from .maths import composed, gated, gates, normalised, perceptron, through


class Home(NamedTuple):
    """Where parameters are made, and of which dtype."""

    device: torch.device
    dtype: torch.dtype


class Change(nn.Module, ABC):
    """A change of the heads of one kind. `linear`: it is the same linear map of every token, so that it can be
    multiplied into the weight of the projection.
    """

    linear: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x_BTHK: Tensor) -> Tensor:
        """The heads after the change, in the same dtype."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """The values that it starts with; for a model made on the meta device, after `to_empty`."""


class Matrices(Change):
    """Square matrices: one of each name for all heads or, with `own`, one for every head."""

    identities: ClassVar[dict[str, float]]
    """The names, each with the diagonal at which heads pass unchanged."""

    def __init__(self, piece: Piece, home: Home, own: bool) -> None:
        super().__init__()
        shape = (piece.heads,) * own + (piece.width,) * 2
        for name in self.identities:
            self.register_parameter(name, _empty(shape, home))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `Change.reset_parameters`."""
        for name, diagonal in self.identities.items():
            _make_diagonal(self.get_parameter(name), diagonal)


class Linear(Matrices):
    """KHA-Linear, x T (KHA eq 5-7)."""

    linear: ClassVar[bool] = True
    identities: ClassVar[dict[str, float]] = {"map": 1.0}
    map: Tensor

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """See `Change.forward`."""
        return through(x_BTHK, self.map.to(x_BTHK.dtype))


class Perceptron(Matrices):
    """KHA-MLP (KHA eq 9)."""

    identities: ClassVar[dict[str, float]] = {"up": 1.0, "gate": 0.0, "down": 1.0}
    up: Tensor
    gate: Tensor
    down: Tensor

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """See `Change.forward`."""
        dtype = x_BTHK.dtype
        return perceptron(x_BTHK, self.up.to(dtype), self.gate.to(dtype), self.down.to(dtype))


class Gate(Matrices):
    """The gate alone (KHA table 2)."""

    identities: ClassVar[dict[str, float]] = {"gate": 0.0}
    gate: Tensor

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """See `Change.forward`."""
        return gated(x_BTHK, self.gate.to(x_BTHK.dtype))


class Composition(Change):
    """Every head becomes a sum of all (MEA eq 10)."""

    linear: ClassVar[bool] = True
    across: Tensor

    def __init__(self, piece: Piece, home: Home) -> None:
        super().__init__()
        self.register_parameter("across", _empty((piece.heads,) * 2, home))
        self.reset_parameters()

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """See `Change.forward`."""
        return composed(x_BTHK, self.across.to(x_BTHK.dtype))

    def reset_parameters(self) -> None:
        """See `Change.reset_parameters`."""
        _make_diagonal(self.across, 1.0)


class Norm(Change):
    """The norm of every head's output (MEA eq 12), which rescales heads from the start."""

    gain: Tensor

    def __init__(self, piece: Piece, home: Home) -> None:
        super().__init__()
        self.register_parameter("gain", _empty((piece.width,), home))
        self.reset_parameters()

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """See `Change.forward`."""
        return normalised(x_BTHK, self.gain.to(x_BTHK.dtype))

    def reset_parameters(self) -> None:
        """See `Change.reset_parameters`."""
        nn.init.ones_(self.gain)


class OutputGate(nn.Module):
    """Multiplies the output of every head by the sigmoid of a projection of the layer's input (Qiu et al. 2025): one
    number for each head, or one for each of its dimensions. It starts with gates of one half.
    """

    def __init__(self, piece: Piece, inputs: int, home: Home, elementwise: bool) -> None:
        super().__init__()
        self.heads = piece.heads
        outputs = piece.heads * (piece.width if elementwise else 1)
        self.weight = _empty((outputs, inputs), home)
        self.reset_parameters()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The gates, from 0 to 1, [B, T, H, 1] or [B, T, H, K], for the input of the attention."""
        return gates(x_BTD, self.weight.to(x_BTD.dtype), self.heads)

    def reset_parameters(self) -> None:
        """See `Change.reset_parameters`."""
        nn.init.zeros_(self.weight)


def _empty(shape: tuple[int, ...], home: Home) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=home.device, dtype=home.dtype))


def _make_diagonal(matrices: Tensor, value: float) -> None:
    """Every matrix of [..., K, K] becomes the identity times `value`, in place."""
    with torch.no_grad():
        matrices.zero_().diagonal(dim1=-2, dim2=-1).fill_(value)
