"""Explicit multi-head attention (MEA, arXiv 2601.19611): learned matrices compose the heads of keys and of values, and
each head's output is normalised.

Composition starts as the identity, but the norm rescales outputs, so with the norm a new model is *not* the baseline.
With another number of components than heads no composition is the identity: see `component_heads`.
"""

# B batch   T tokens (U: attended tokens)   H query heads   G key/value heads or their components
# K query/key head width   W value head width

from __future__ import annotations

from torch import Tensor, nn

from kha_train.heads.maths import NORM_EPS
from kha_train.model.attention.interaction import Folds, Interaction, starting_matrix
from kha_train.model.attention.projection import HeadMap, Matrix
from kha_train.model.norm import RmsNorm
from kha_train.variants.attention import HeadShape, Implementation
from kha_train.variants.explicit import ExplicitOptions


class Explicit(Interaction):
    """HLC(X)_o = sum_i X_i W[i, o] on keys and values (MEA eq 10-12, 14-17), before QK-norm and RoPE or, for the
    linearity ablation, on keys after them; then an RMSNorm of each head's output, with one gain for all heads.

    What decoding caches uncomposed is composed after the cache, in training too.
    """

    linear = True

    def __init__(self, options: ExplicitOptions, heads: HeadShape, way: Implementation) -> None:
        super().__init__(options, heads, way)
        matrices: dict[str, nn.Module] = {}
        places: dict[str, str] = {}
        identities = options.identities(heads)
        for p in options.compose:
            diagonal = identities[p]
            shape, initial = (options.components(p, heads), heads.kv_heads), starting_matrix(options.init, diagonal)
            matrices[p] = Matrix(shape, initial, diagonal, across=True, train=options.train)
            if options.composed_when_read(p, heads):
                places[p] = "read"
            elif p == "k" and options.mix_after_rope:
                places[p] = "rotated"
        self.compose, self.tied, self.places = nn.ModuleDict(matrices), heads.tied, places
        read = places.get("k") == "read" and not self.folded
        self.keeps_projected_keys = read and heads.normed and not options.mix_after_rope
        self.norm = RmsNorm(heads.value_width, NORM_EPS) if options.head_norm else nn.Identity()

    def linear_maps(self) -> Folds:
        """Both compositions (not used when keys are mixed after rotation)."""
        return Folds(**{p: HeadMap(across_IO=matrix()) for p, matrix in self.compose.items()})

    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Interaction.forward`."""
        return q_BTHK, self._mix("k", k_BTGK, "projected"), self._mix("v", v_BTGW, "projected")

    def rotated_keys(self, k_BTGK: Tensor) -> Tensor:
        """See `Interaction.rotated_keys`."""
        return self._mix("k", k_BTGK, "rotated")

    def read_keys(self, k_BUGK: Tensor) -> Tensor:
        """See `Interaction.read_keys`."""
        return self._mix("v" if self.tied else "k", k_BUGK, "read")

    def read_values(self, v_BUGW: Tensor) -> Tensor:
        """See `Interaction.read_values`."""
        return v_BUGW if self.tied else self._mix("v", v_BUGW, "read")

    def outputs(self, out_BTHW: Tensor) -> Tensor:
        """See `Interaction.outputs`."""
        normed_BTHW: Tensor = self.norm(out_BTHW)
        return normed_BTHW

    def _mix(self, projection: str, x_BTGK: Tensor, place: str) -> Tensor:
        if self.folded or projection not in self.compose or self.places.get(projection, "projected") != place:
            return x_BTGK
        return HeadMap(across_IO=self.compose[projection](x_BTGK.dtype)).apply(x_BTGK)
