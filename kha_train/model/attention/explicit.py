"""Explicit multi-head attention (MEA, arXiv 2601.19611): learned matrices compose the heads of keys and of values, and
each head's output is normalised.

Composition starts as the identity, but the norm rescales outputs, so with the norm a new model is *not* the baseline.
"""

# B batch   T tokens   H query heads   G key/value heads   K query/key head width   W value head width

from __future__ import annotations

from torch import Tensor, nn

from kha_train.model.attention.interaction import Folds, Interaction, starting_matrix
from kha_train.model.attention.projection import HeadMap, Matrix
from kha_train.model.norm import RmsNorm
from kha_train.variants.attention import HeadShape, Implementation
from kha_train.variants.interactions import ExplicitOptions

NORM_EPS = 1e-5
"""The eps of the normalised heads from which MEA takes its norm (Differential Transformer, arXiv 2410.05258)."""


class Explicit(Interaction):
    """HLC(X)_o = sum_i X_i W[i, o] on keys and values (MEA eq 10-12, 14-17), before QK-norm and RoPE or, for the
    linearity ablation, on keys after them; then an RMSNorm of each head's output, with one gain for all heads.
    """

    linear = True

    def __init__(self, options: ExplicitOptions, heads: HeadShape, way: Implementation) -> None:
        super().__init__(options, heads, way)
        self.after_rope = options.mix_after_rope
        matrices = {
            p: Matrix(
                (heads.kv_heads,) * 2,
                starting_matrix(options.init, diagonal),
                diagonal,
                across=True,
                train=options.train,
            )
            for p, diagonal in options.identities().items()
        }
        self.compose = nn.ModuleDict(matrices)
        self.norm = RmsNorm(heads.value_width, NORM_EPS) if options.head_norm else nn.Identity()

    def linear_maps(self) -> Folds:
        """Both compositions (not used when keys are mixed after rotation)."""
        return Folds(**{p: HeadMap(across_IO=matrix()) for p, matrix in self.compose.items()})

    def forward(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Interaction.forward`."""
        if self.folded:
            return q_BTHK, k_BTGK, v_BTGW
        return q_BTHK, k_BTGK if self.after_rope else self._mix("k", k_BTGK), self._mix("v", v_BTGW)

    def rotated_keys(self, k_BTGK: Tensor) -> Tensor:
        """See `Interaction.rotated_keys`."""
        return self._mix("k", k_BTGK) if self.after_rope else k_BTGK

    def outputs(self, out_BTHW: Tensor) -> Tensor:
        """See `Interaction.outputs`."""
        normed_BTHW: Tensor = self.norm(out_BTHW)
        return normed_BTHW

    def _mix(self, projection: str, x_BTGK: Tensor) -> Tensor:
        if projection not in self.compose:
            return x_BTGK
        return HeadMap(across_IO=self.compose[projection](x_BTGK.dtype)).apply(x_BTGK)
