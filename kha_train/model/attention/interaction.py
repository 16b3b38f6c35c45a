"""How heads meet: the contract of a head interaction.

An interaction may act at three places: on the projected q, k, v; on the head outputs before the output projection; and,
where the mathematics allows, as a fold into the projection weights. So far every interaction acts at the first place
alone, so that is all the contract asks. A second place is a child module of the interaction, called by the base: a
parameter may be used only inside the forward of the module that owns it (sharded engines gather it there).
"""

# B batch   T tokens   H query heads   G key/value heads   K query/key head width   W value head width

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from kha_train.config.options import HeadShape, InteractionOptions
from kha_train.config.registry import INTERACTIONS
from kha_train.model.init import DeclaredModule


class Interaction(DeclaredModule, ABC):
    """Called right after the projections, before QK-norm and RoPE. Starts as the exact identity where the mathematics
    says so. `options` are those of its registry entry."""

    def __init__(self, options: InteractionOptions, heads: HeadShape) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projected queries, keys and values after the heads have met; same shapes and dtypes."""


class NoInteraction(Interaction):
    """Heads never meet: the baseline."""

    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its arguments."""
        return q_BTHK, k_BTGK, v_BTGW


def build_interaction(options: InteractionOptions, heads: HeadShape) -> Interaction:
    """The interaction registered under `options.name`, for heads of that shape."""
    return INTERACTIONS[options.name].load()(options, heads)
