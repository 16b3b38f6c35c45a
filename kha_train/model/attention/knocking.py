"""Knocking-heads (KHA, arXiv 2510.23052): heads exchange information before attention, through matrices shared by all
heads of a kind. With `share: none` every head has its own matrices and none is shared: the control for what sharing
does.

All forms start as the exact identity by default: diagonal matrices are the identity, the gate is zero and 2 *
sigmoid(0) = 1.
"""

# B batch   T tokens (U: attended tokens)   H heads of one kind   G key/value heads   K head width   W value head width

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from kha_train.heads.maths import gated, perceptron, through
from kha_train.model.attention.interaction import Folds, Gated, Interaction, starting_matrix
from kha_train.model.attention.projection import HeadMap, Matrix
from kha_train.model.kernels.knocking_mlp import knocking_mlp
from kha_train.variants.attention import HeadShape, Implementation
from kha_train.variants.interactions import KnockingOptions


def knocking_matrix(name: str, shape: tuple[int, ...], options: KnockingOptions) -> Matrix:
    """The matrix, or the stack of one for each head, named in `options.matrices`, with the initial rule of
    `options.init`.
    """
    diagonal = options.matrices[name]
    return Matrix(shape, starting_matrix(options.init, diagonal), diagonal, train=options.train)


class Knocking(Interaction):
    """One map for each projection named in `options.projections`; the others pass unchanged."""

    def __init__(self, options: KnockingOptions, heads: HeadShape, way: Implementation) -> None:
        super().__init__(options, heads, way)
        self.fused, self.value_only = way.name == "triton", options.value_only
        self.maps = nn.ModuleDict({p: self.head_map(options.shape(heads, p), options) for p in options.projections})

    @abstractmethod
    def head_map(self, shape: tuple[int, ...], options: KnockingOptions) -> nn.Module:
        """The map of the heads of one kind, whose matrices are of this shape: [K, K], or [H, K, K]."""

    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Interaction.forward`."""
        v_BTGW = v_BTGW if self.value_only else self._map("v", v_BTGW)
        return self._map("q", q_BTHK), self._map("k", k_BTGK), v_BTGW

    def read_values(self, v_BUGW: Tensor) -> Tensor:
        """See `Interaction.read_values`."""
        return self._map("v", v_BUGW) if self.value_only else v_BUGW

    def _map(self, projection: str, x_BTHK: Tensor) -> Tensor:
        return self.maps[projection](x_BTHK) if projection in self.maps else x_BTHK


class KnockingLinear(Knocking):
    """KHA-Linear, x~ = x T (eq 5-7): multiplied into the projection weights during training when folded, and
    permanently after it (eq 8).
    """

    linear = True

    def head_map(self, shape: tuple[int, ...], options: KnockingOptions) -> nn.Module:
        """T [K, K]."""
        return knocking_matrix("map", shape, options)

    def linear_maps(self) -> Folds:
        """All of it; attention is linear in values, so a map of values alone is one of outputs."""
        places = {projection: projection for projection in self.maps} | ({"v": "output"} if self.value_only else {})
        return Folds(**{places[projection]: HeadMap(within_KK=matrix()) for projection, matrix in self.maps.items()})

    def _map(self, projection: str, x_BTHK: Tensor) -> Tensor:
        if projection not in self.maps or self.folded:
            return x_BTHK
        return through(x_BTHK, self.maps[projection](x_BTHK.dtype))


class HeadMlp(Gated):
    """x~ = 2 ((x W_up) * sigmoid(x W_gate)) W_down for every head, all matrices [K, K] (KHA eq 9)."""

    def __init__(self, shape: tuple[int, ...], options: KnockingOptions, fused: bool) -> None:
        super().__init__()
        self.compute = knocking_mlp if fused else perceptron
        self.up, self.gate, self.down = (knocking_matrix(name, shape, options) for name in ("up", "gate", "down"))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Every head through the same gated perceptron."""
        mixed_BTHK: Tensor = self.compute(x_BTHK, *(matrix(x_BTHK.dtype) for matrix in (self.up, self.gate, self.down)))
        return mixed_BTHK

    def hidden(self, x_BTHK: Tensor) -> Tensor:
        """The perceptron up to its last matrix."""
        hidden_BTHK: Tensor = self.compute(x_BTHK, self.up(x_BTHK.dtype), self.gate(x_BTHK.dtype), None)
        return hidden_BTHK

    def gates(self, x_BTHK: Tensor) -> Tensor:
        """See `Gated.gates`."""
        return torch.sigmoid(through(x_BTHK, self.gate(x_BTHK.dtype)))

    def derivative(self, x_BTHK: Tensor) -> Tensor:
        """See `Gated.derivative`."""
        up, gate, down = (matrix(x_BTHK.dtype) for matrix in (self.up, self.gate, self.down))
        gates_BTHK = self.gates(x_BTHK)
        gated_HKK = up * gates_BTHK.mean(dim=(0, 1))[:, None] + gate * _slope(through(x_BTHK, up), gates_BTHK)
        return _as_shared(2.0 * gated_HKK @ down, gate)


class KnockingMlp(Knocking):
    """KHA-MLP: the paper's default, on the values alone. Attention is linear in the values, so folded the last matrix
    of their map is a part of the output projection."""

    def head_map(self, shape: tuple[int, ...], options: KnockingOptions) -> nn.Module:
        """See `HeadMlp`."""
        return HeadMlp(shape, options, self.fused)

    def linear_maps(self) -> Folds:
        """W_down of the values."""
        return Folds(output=HeadMap(within_KK=self._value_map().down()))

    def _map(self, projection: str, x_BTHK: Tensor) -> Tensor:
        if self.folded and projection == "v":
            return self._value_map().hidden(x_BTHK)
        return super()._map(projection, x_BTHK)

    def _value_map(self) -> HeadMlp:
        value_map = self.maps["v"]
        assert isinstance(value_map, HeadMlp)
        return value_map


class HeadGate(Gated):
    """x~ = 2 x * sigmoid(x W_gate) for every head (KHA table 2 names it without a formula; this is the natural one)."""

    def __init__(self, shape: tuple[int, ...], options: KnockingOptions) -> None:
        super().__init__()
        self.gate = knocking_matrix("gate", shape, options)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Every head through the same gate."""
        return gated(x_BTHK, self.gate(x_BTHK.dtype))

    def gates(self, x_BTHK: Tensor) -> Tensor:
        """See `Gated.gates`."""
        return torch.sigmoid(through(x_BTHK, self.gate(x_BTHK.dtype)))

    def derivative(self, x_BTHK: Tensor) -> Tensor:
        """See `Gated.derivative`."""
        gate, gates_BTHK = self.gate(x_BTHK.dtype), self.gates(x_BTHK)
        own_HKK = torch.diag_embed(gates_BTHK.mean(dim=(0, 1)))
        return _as_shared(2.0 * (own_HKK + gate * _slope(x_BTHK, gates_BTHK)), gate)


def _slope(gated_BTHK: Tensor, gates_BTHK: Tensor) -> Tensor:
    """By how much a gated value changes with the input of its gate, [H, 1, K]: the mean of value * g (1 - g)."""
    return (gated_BTHK * gates_BTHK * (1.0 - gates_BTHK)).mean(dim=(0, 1))[:, None]


def _as_shared(derivative_HKK: Tensor, matrix: Tensor) -> Tensor:
    """The derivative of each head, or their mean if heads share `matrix`."""
    return derivative_HKK if matrix.ndim > 2 else derivative_HKK.mean(dim=0)


class KnockingGate(Knocking):
    """The gate alone: the paper's failing ablation."""

    def head_map(self, shape: tuple[int, ...], options: KnockingOptions) -> nn.Module:
        """See `HeadGate`."""
        return HeadGate(shape, options)
