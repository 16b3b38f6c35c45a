"""The contract of a head interaction, through which heads exchange information.

An interaction acts at up to five places: on the projected q, k, v (`forward`); on keys after norm and rotation
(`rotated_keys`); on keys and values as attention reads them, after the cache (`read_keys`, `read_values`); on the head
outputs before the output projection (`outputs`); and, where the mathematics allows, as a fold into the weights beside
it (`folds`). A base calls all of them; each does nothing unless a variant overrides it. A parameter may be used only
inside the forward of the module that owns it (sharded engines gather it there), so matrices are `Matrix` modules, which
return copies.
"""

# B batch   T tokens (U: attended tokens)   H query heads   G key/value heads   K query/key head width
# W value head width

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from kha_train.config.schema import RunConfig
from kha_train.metric import Metric
from kha_train.model.attention.projection import HeadMap
from kha_train.model.init import Blocks, DeclaredModule, Identity, Initial, Orthogonal, SizeKeeping
from kha_train.variants.attention import HeadShape, Implementation, InteractionOptions
from kha_train.variants.interactions import MatrixInit
from kha_train.variants.registry import INTERACTIONS

QKV = tuple[Tensor, Tensor, Tensor]


class Folds(NamedTuple):
    """The maps that projections and output multiply into their weights."""

    q: HeadMap | None = None
    k: HeadMap | None = None
    v: HeadMap | None = None
    output: HeadMap | None = None


class Interaction(DeclaredModule, ABC):
    """Starts as the exact identity where the mathematics allows it. `options` are those of its registry entry, `way` is
    how it is computed. When folded, it leaves `linear_maps` to `folds`, and `forward` does the rest. `linear` says that
    there is no rest: `forward` only applies `linear_maps`, so that decoding may attend to latents instead of keys.
    One that declares `metrics` has a fourth argument of `forward`, `report: Report = UNREAD`, to report them.
    """

    linear: ClassVar[bool] = False
    metrics: tuple[Metric, ...] = ()
    keeps_projected_keys: bool = False
    """Whether decoding keeps keys as they are projected, because `read_keys` comes before their norm and rotation. Only
    a base whose heads are `projected` is asked for it."""

    def __init__(self, options: InteractionOptions, heads: HeadShape, way: Implementation) -> None:
        super().__init__()
        self.folded = way.folded

    def folds(self) -> Folds:
        """The maps for the weights in this forward; none unless folded."""
        return self.linear_maps() if self.folded else Folds()

    def linear_maps(self) -> Folds:
        """All maps that can be multiplied into the weights."""
        return Folds()

    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> QKV:
        """The projected queries, keys and values after the heads have exchanged information, before QK-norm and RoPE;
        same shapes and dtypes.
        """
        return q_BTHK, k_BTGK, v_BTGW

    def rotated_keys(self, k_BTGK: Tensor) -> Tensor:
        """Keys after QK-norm and RoPE."""
        return k_BTGK

    def read_keys(self, k_BUGK: Tensor) -> Tensor:
        """Keys as attention reads them, those of earlier tokens in the cache included; on a tied base its states,
        before keys and values are made of them.
        """
        return k_BUGK

    def read_values(self, v_BUGW: Tensor) -> Tensor:
        """The same of values."""
        return v_BUGW

    def outputs(self, out_BTHW: Tensor) -> Tensor:
        """Head outputs before the output projection."""
        return out_BTHW


class Gated(nn.Module, ABC):
    """A map of heads with a gate that can be looked at in a trained model. Neither method is used by `forward`."""

    @abstractmethod
    def gates(self, x_BTHK: Tensor) -> Tensor:
        """The values of the gate, 0 to 1, for the input of `forward`: [B, T, H, K]."""

    @abstractmethod
    def derivative(self, x_BTHK: Tensor) -> Tensor:
        """The mean over tokens of the derivative of a head's output y by its input x, d y_j / d x_i at [i, j]: the
        linear map that the module is on average. [H, K, K] or, as a mean over heads that share matrices, [K, K].
        """


class NoInteraction(Interaction):
    """No interaction between heads: the baseline."""

    linear = True


def build_interaction(config: RunConfig, way: Implementation, layer: int) -> Interaction:
    """The interaction of a layer, from the registry, on the heads of the configured base."""
    options = config.attention.interaction.at(layer)
    interaction: Interaction = INTERACTIONS[options.name].load()(options, config.attention.heads(), way)
    return interaction


def starting_matrix(init: MatrixInit, diagonal: float | None) -> Initial:
    """The initial rule of a square matrix that leaves heads unchanged when it is `diagonal` times the identity, or of a
    composition of heads that cannot (None).
    """
    if init.kind == "random":
        return SizeKeeping(init.scale)
    if init.kind == "random_orthogonal":
        return Orthogonal(init.scale)
    if diagonal is None:
        return Blocks(init.scale if init.kind == "scaled_identity" else 1.0)
    return Identity(diagonal * init.scale if init.kind == "scaled_identity" else diagonal)
