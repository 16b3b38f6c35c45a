"""Knocking-heads (KHA, arXiv 2510.23052): matrices shared by all heads of a kind let heads meet before attention.

Both forms start as the exact identity: diagonal matrices are the identity, the gate is zero and 2 * sigmoid(0) = 1.
"""

# B batch   T tokens   H heads of one kind   G key/value heads   K head width   W value head width

from __future__ import annotations

import torch
from torch import Tensor, nn

from kha_train.config.options import HeadShape, KnockingOptions
from kha_train.model.attention.interaction import Interaction
from kha_train.model.init import Constant, DeclaredModule, Identity


class SharedLinear(DeclaredModule):
    """x~ = x T for every head, one T [K, K] (KHA eq 5-7)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.declare_parameter("transform", (width, width), Identity())

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Every head times the same matrix."""
        return x_BTHK @ self.transform


class SharedMlp(DeclaredModule):
    """x~ = 2 ((x W_up) * sigmoid(x W_gate)) W_down for every head, all matrices [K, K] (KHA eq 9)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.declare_parameter("up", (width, width), Identity())
        self.declare_parameter("gate", (width, width), Constant(0.0))
        self.declare_parameter("down", (width, width), Identity())

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Every head through the same gated perceptron."""
        return (2.0 * (x_BTHK @ self.up) * torch.sigmoid(x_BTHK @ self.gate)) @ self.down


class Knocking(Interaction):
    """One shared map for each projection named in `options.projections`; the others pass unchanged."""

    shared: type[SharedLinear | SharedMlp]

    def __init__(self, options: KnockingOptions, heads: HeadShape) -> None:
        super().__init__(options, heads)
        for projection in ("q", "k", "v"):
            width = heads.width(projection)
            self.add_module(
                projection, self.shared(heads.width(projection)) if projection in options.projections else nn.Identity()
            )

    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Interaction.forward`."""
        return self.q(q_BTHK), self.k(k_BTGK), self.v(v_BTGW)


class KnockingLinear(Knocking):
    """KHA-Linear: can be absorbed into the projection weights after training (KHA eq 8)."""

    shared = SharedLinear


class KnockingMlp(Knocking):
    """KHA-MLP: the paper's default, on the values alone."""

    shared = SharedMlp
