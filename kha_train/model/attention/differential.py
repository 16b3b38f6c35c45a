"""Differential attention (DIFF, Ye et al. 2024, arXiv 2410.05258): the difference of two softmax maps for each pair of
query heads.

    o_p = (1 - l0) RMSNorm((softmax(q_1 k_1^T / sqrt(K)) - l softmax(q_2 k_2^T / sqrt(K))) [v_a | v_b])
    l = exp(a_1 . b_1) - exp(a_2 . b_2) + l0        l0 = 0.8 - 0.6 exp(-0.3 (layer - 1)), layers counted from 1

Values are twice as wide as keys, so a backend is called once for each half: kernels want one width.
"""

# B batch   T tokens (U: attended tokens)   H query heads   G key/value heads   P = H / 2 pairs   N = H / G
# K head width

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import Documents
from kha_train.model.attention.grouped_query import GroupedQueryAttention
from kha_train.model.init import DeclaredModule, Normal
from kha_train.model.norm import RmsNorm

NORM_EPS, LAMBDA_STD = 1e-5, 0.1
"""Both as in the released code."""


class Lambda(DeclaredModule):
    """The weight of the second maps of a layer, made of four vectors of a head's width."""

    a_1: nn.Parameter
    b_1: nn.Parameter
    a_2: nn.Parameter
    b_2: nn.Parameter

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        for name in ("a_1", "b_1", "a_2", "b_2"):
            self.declare_parameter(name, (width,), Normal(LAMBDA_STD))

    def forward(self) -> Tensor:
        """A scalar, in at least fp32."""
        a_1, b_1, a_2, b_2 = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (self.a_1, self.b_1, self.a_2, self.b_2)
        )
        return (a_1 * b_1).sum().exp() - (a_2 * b_2).sum().exp() + self.start


class DifferentialAttention(GroupedQueryAttention):
    """Key heads 2g and 2g + 1 are k_1 and k_2 of group g, value heads 2g and 2g + 1 its v_a and v_b. Query heads of a
    key head stand side by side, as in every grouped attention: for each group first all q_1, then all q_2. The halves
    of a pair's output are two heads for an interaction and for a gate.

    The same function as transformers' `DiffLlamaAttention`, of weights that are laid out otherwise: there all q_1 come
    before all q_2, all k_1 before all k_2, all v_a before all v_b, and the pairs of a key group share it likewise. It
    has no QK-norm, which is `attention.qk_norm=none` here, and its norm has no gain. Both count layers from 0 for l0.
    """

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__(config, resolved, layer)
        head_dim, self.start = config.attention.base.head_dim, 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.second = Lambda(head_dim, self.start)
        self.head_norm = RmsNorm(2 * head_dim, NORM_EPS)
        self.kernel = self.attend
        self.attend = self._differ

    def _differ(self, q_BTHK: Tensor, k_BUGK: Tensor, v_BUGK: Tensor, documents: Documents, scale: float) -> Tensor:
        """A backend's signature: two calls of the real one, their difference and its norm."""
        groups, weight, halves = k_BUGK.shape[2] // 2, self.second(), []
        for half in (0, 1):
            # Both maps of a group read the same half of its values.
            same_BUGK = v_BUGK[:, :, half::2].repeat_interleave(2, dim=2)
            out_BTHK = self.kernel(q_BTHK, k_BUGK, same_BUGK, documents, scale)
            first_BTGNK, second_BTGNK = out_BTHK.unflatten(2, (groups, 2, -1)).unbind(3)
            halves.append((first_BTGNK - weight.to(out_BTHK.dtype) * second_BTGNK).flatten(2, 3))
        normed_BTPK: Tensor = self.head_norm(torch.cat(halves, dim=-1)) * (1.0 - self.start)
        out: Tensor = normed_BTPK.unflatten(-1, (2, -1)).flatten(2, 3)
        return out
