"""Talking-heads attention (arXiv 2003.02436): heads mix in the scores and in the weights. This is a reference: it needs
all scores, so it is eager and limited to short rows.

    weights = softmax(sum_i scores_i L[i, h])      out_h = sum_i weights_i M[i, h] v_g      L, M start as the identity
"""

# B batch   T tokens (U: attended tokens)   G key/value heads   H, I heads   K, W key and value head width

from __future__ import annotations

import torch
from torch import Tensor

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import Documents, masked_softmax, scores, weighted_values
from kha_train.model.attention.grouped_query import GroupedQueryAttention
from kha_train.model.attention.projection import Matrix
from kha_train.model.init import Identity


class TalkingHeadsAttention(GroupedQueryAttention):
    """Grouped-query attention that mixes heads before and after the softmax."""

    score_mix: Matrix
    weight_mix: Matrix

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__(config, resolved, layer)
        for name, diagonal in config.attention.base.identities().items():
            assert diagonal is not None
            setattr(self, name, Matrix((self.heads.query_heads,) * 2, Identity(diagonal), diagonal, across=True))
        self.attend = self._talk

    def weights(self, q_BTHK: Tensor, k_BUGK: Tensor, documents: Documents, scale: float) -> Tensor:
        """See `Attention.weights`. These are the weights of the softmax: after their mix they need not sum to 1."""
        scores_BITU = scores(q_BTHK, k_BUGK) * scale
        mixed_BHTU = torch.einsum("bitu,ih->bhtu", scores_BITU, self.score_mix().to(scores_BITU.dtype))
        return masked_softmax(mixed_BHTU, documents)

    def _talk(self, q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
        """A backend's signature, with the two mixes inside."""
        weights_BITU = self.weights(q_BTHK, k_BUGK, documents, scale).to(v_BUGW.dtype)
        return weighted_values(torch.einsum("bitu,ih->bhtu", weights_BITU, self.weight_mix()), v_BUGW)
