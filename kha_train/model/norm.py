"""RMSNorm, over the model width or over the heads of queries and keys."""

# ... leading dimensions   D the normalised width   B batch   T tokens   H heads   K head width

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.init import Constant, DeclaredModule
from kha_train.model.kernels.norm_rotate import norm_rotate
from kha_train.model.rope import Rotary


class _Gain(DeclaredModule):
    """The parameter of RMSNorms: one weight for each of `width` numbers."""

    weight: nn.Parameter

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.declare_parameter("weight", (width,), Constant(1.0))


class RmsNorm(_Gain):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean is taken in at least fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of `x`."""
        return functional.rms_norm(x, (self.width,), self.weight, self.eps)


class FullWidthNorm(RmsNorm):
    """RMSNorm over all heads of a token at once."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, K] -> [B, T, H, K], normalised over H * K."""
        return super().forward(x.flatten(2)).view_as(x)


class TurningNorm(_Gain):
    """RMSNorm of every head followed by its rotation, in one kernel."""

    def forward(self, x_BTHK: Tensor, rotary: Rotary) -> Tensor:
        """[B, T, H, K] -> [B, T, H, K], normalised over K and rotated by the token's angles."""
        turned_BTHK: Tensor = norm_rotate(x_BTHK, self.weight, rotary.cos_BTR, rotary.sin_BTR, self.eps)
        return turned_BTHK


def build_turning_norm(config: RunConfig, resolved: Resolved, heads: int, head_dim: int) -> nn.Module:
    """The norm of queries or keys that are rotated as whole heads, for `RowContext.norm_and_turn`. `resolved` decides
    whether it is one kernel with the rotation.
    """
    if resolved.norm.name == "triton":
        return TurningNorm(head_dim, config.model.norm_eps)
    return build_qk_norm(config, heads, head_dim)


def build_qk_norm(config: RunConfig, heads: int, head_dim: int) -> nn.Module:
    """The norm of queries or keys [B, T, H, K] according to `attention.qk_norm`: one weight of K shared by all heads,
    one of H * K, or none.
    """
    match config.attention.qk_norm:
        case "per_head":
            return RmsNorm(head_dim, config.model.norm_eps)
        case "full_width":
            return FullWidthNorm(heads * head_dim, config.model.norm_eps)
        case "none":
            return nn.Identity()
