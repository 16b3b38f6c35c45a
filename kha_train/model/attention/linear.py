"""Causal linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), with the feature map f(x) = elu(x) + 1.

    o_t = sum_{s <= t} (R_t f(q_t) . R_s f(k_s)) v_s / sum_{s <= t} f(q_t) . f(k_s)      s, t of the same document

R is the rotation of the position (RoFormer, arXiv 2104.09864, section 3.4.2): it comes after the feature map, so that
the numerator depends on distances, and the denominator goes without it, so that it stays positive. The two sums are
linear in the past, which is a state of constant size: `chunked` needs no T x T scores, and decoding no cache of tokens.
"""

# B batch   T tokens (U: attended tokens)   D model width   H query heads   G key/value heads   K, W key and value width
# N = H / G   C chunks   L tokens of a chunk   J = 1   S borders of documents

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import Backend, Documents, causal_TU, document_numbers, scores, weighted_values
from kha_train.model.attention.base import Attention, RowContext
from kha_train.model.attention.projection import OutputProjection, Projection
from kha_train.model.init import Normal, residual_std
from kha_train.model.norm import build_qk_norm
from kha_train.variants.bases import LinearOptions


class LinearAttention(Attention):
    """Grouped-query attention without softmax. `attend` computes the numerators of the formula above. An interaction on
    rotated or cached keys acts on normalised keys: the features of what it makes are positive.
    """

    folded: ClassVar[dict[str, str]] = {"q": "query", "k": "key", "v": "value"}

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__(config, resolved, layer)
        base = config.attention.base
        assert isinstance(base, LinearOptions)
        width, head_dim, normal = config.model.hidden_size, base.head_dim, Normal(config.model.init_std)
        self.query = Projection(width, base.query_heads, head_dim, normal)
        self.key = Projection(width, self.components("k"), head_dim, normal)
        self.value = Projection(width, self.components("v"), head_dim, normal)
        self.output = OutputProjection(base.query_heads, head_dim, width, Normal(residual_std(config)))
        self.query_norm = build_qk_norm(config, base.query_heads, head_dim)
        self.key_norm = build_qk_norm(config, base.kv_heads, head_dim)
        self.sums = self.attend

    def backend(self, config: RunConfig, resolved: Resolved) -> Backend:
        """See `Attention.backend`."""
        base = config.attention.base
        assert isinstance(base, LinearOptions)
        return eager if resolved.backend.name == "eager" else partial(chunked, base.chunk_tokens)

    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """See `Attention.forward`."""
        folds = self.interaction.folds()
        q_BTHK, k_BTGK, v_BTGW = self.exchange(
            rows, self.query(x_BTD, folds.q), self.key(x_BTD, folds.k), self.value(x_BTD, folds.v)
        )
        k_BTGK = self.interaction.read_keys(self.interaction.rotated_keys(self.key_norm(k_BTGK)))
        q_BTHK, k_BTGK = features(self.query_norm(q_BTHK)), features(k_BTGK)
        over_BTHW, under_BTGK = self._fraction(
            rows, rows.turn(q_BTHK), rows.turn(k_BTGK), k_BTGK, self.interaction.read_values(v_BTGW)
        )
        under_BTH = (q_BTHK.unflatten(2, (k_BTGK.shape[2], -1)) * under_BTGK.unsqueeze(3)).sum(-1).flatten(2)
        out_BTHW = over_BTHW / under_BTH.unsqueeze(-1)
        out_BTD: Tensor = self.output(self.finished(rows, x_BTD, out_BTHW), folds.output)
        return out_BTD

    def weights(self, q_BTHK: Tensor, k_BUGK: Tensor, documents: Documents, scale: float) -> None:
        """See `Attention.weights`. Rotated scores do not sum to the denominator."""

    def _fraction(
        self, rows: RowContext, q_BTHK: Tensor, k_BTGK: Tensor, still_BTGK: Tensor, v_BTGW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The numerators, and the sum of the unrotated features of all keys up to each token. While decoding, `rows`
        keep both sums of the earlier tokens.
        """
        ones_BTG1 = torch.ones_like(still_BTGK[..., :1])
        documents = rows.documents if rows.cache is None else Documents(None, q_BTHK.shape[1], None)
        over_BTHW = self.attend(q_BTHK, k_BTGK, v_BTGW, documents, 1.0)
        under_BTGK = self.sums(ones_BTG1, ones_BTG1, still_BTGK, documents, 1.0)
        if rows.cache is None:
            return over_BTHW, under_BTGK
        state_BGKW = torch.einsum("btgk,btgw->bgkw", k_BTGK, v_BTGW)
        state_BGKW, past_BGK = rows.past_sums(self, state_BGKW, still_BTGK.sum(1))
        q_BTGNK = q_BTHK.unflatten(2, (k_BTGK.shape[2], -1))
        read_BTHW = torch.einsum("btgnk,bgkw->btgnw", q_BTGNK, state_BGKW).flatten(2, 3)
        return over_BTHW + read_BTHW, under_BTGK + past_BGK.unsqueeze(1)


def features(x: Tensor) -> Tensor:
    """elu(x) + 1, without its cancellation: e^x up to 0, 1 + x above."""
    return x.clamp(max=0.0).exp() + x.relu()


def eager(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """The sum over s <= t of the same document of (q_t . k_s) scale v_s, with all scores held: the definition."""
    mask_BJTU, tokens = documents.mask_BJTU, q_BTHK.shape[1]
    if mask_BJTU is None:
        mask_BJTU = causal_TU(tokens, tokens, q_BTHK.device)
    return weighted_values((scores(q_BTHK, k_BTGK) * scale).masked_fill(~mask_BJTU, 0.0), v_BTGW)


def chunked(longest: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """The same, with the scores of chunks of at most `longest` tokens. What a token has from earlier chunks is read
    from a sum of k v^T.
    """
    tokens, groups = q_BTHK.shape[1], k_BTGK.shape[2]
    size = min(longest, tokens)
    document_BCL = _documents(documents, q_BTHK, size)
    # Query heads of a group and tokens of a chunk are the rows of one product.
    q_BCGNLK = _in_chunks(q_BTHK * scale, size).unflatten(2, (groups, -1))
    k_BCGLK, v_BCGLW = _in_chunks(k_BTGK, size), _in_chunks(v_BTGW, size)
    seen = causal_TU(size, size, q_BTHK.device)
    if document_BCL is not None:
        seen = (seen & (document_BCL[..., None] == document_BCL[..., None, :]))[:, :, None, None]
    scores_BCGNLL = _rows_times(q_BCGNLK, k_BCGLK.mT) * seen.to(q_BTHK.dtype)
    out_BCGNLW = _rows_times(scores_BCGNLL, v_BCGLW)
    if tokens > size:
        out_BCGNLW = out_BCGNLW + _from_earlier_chunks(q_BCGNLK, k_BCGLK, v_BCGLW, document_BCL)
    return out_BCGNLW.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)[:, :tokens]


def _from_earlier_chunks(q_BCGNLK: Tensor, k_BCGLK: Tensor, v_BCGLW: Tensor, document_BCL: Tensor | None) -> Tensor:
    """What the tokens of each chunk read of the chunks before: only of the document in which the last of these ends,
    because earlier documents cannot go on. The sums over chunks are in at least fp32.
    """
    goes_on_BC = None
    if document_BCL is not None:
        last_BC = document_BCL[..., -1]
        before_BC = last_BC.roll(1, dims=1)
        goes_on_BC = last_BC == before_BC
        k_BCGLK = k_BCGLK * (document_BCL == last_BC[..., None])[:, :, None, :, None]
        q_BCGNLK = q_BCGNLK * (document_BCL == before_BC[..., None])[:, :, None, None, :, None]
    added_BCGKW = k_BCGLK.mT @ v_BCGLW
    added_BCGKW = added_BCGKW.to(torch.promote_types(added_BCGKW.dtype, torch.float32))
    states = [torch.zeros_like(added_BCGKW[:, 0])]
    for chunk in range(added_BCGKW.shape[1] - 1):
        kept_BGKW = states[-1] if goes_on_BC is None else states[-1] * goes_on_BC[:, chunk, None, None, None]
        states.append(kept_BGKW + added_BCGKW[:, chunk])
    return _rows_times(q_BCGNLK, torch.stack(states, dim=1).to(q_BCGNLK.dtype))


def _in_chunks(x_BTHK: Tensor, size: int) -> Tensor:
    """[B, T, H, K] -> [B, C, H, L, K], the last chunk filled up with zeros."""
    x_BTHK = functional.pad(x_BTHK, (0, 0, 0, 0, 0, -x_BTHK.shape[1] % size))
    x_BCHLK: Tensor = x_BTHK.unflatten(1, (-1, size)).transpose(2, 3).contiguous()
    return x_BCHLK


def _documents(documents: Documents, q_BTHK: Tensor, size: int) -> Tensor | None:
    """A number for the document of each token, in chunks [B, C, L]; None where every row is one document."""
    batch, tokens, *_ = q_BTHK.shape
    borders_S = documents.cu_seqlens_S
    if borders_S is None or borders_S.numel() == batch + 1:
        return None
    document_BT = document_numbers(borders_S, batch, tokens)
    document_BCL: Tensor = functional.pad(document_BT, (0, -tokens % size), value=-1).unflatten(1, (-1, size))
    return document_BCL


def _rows_times(rows_BCGNLK: Tensor, matrix_BCGKW: Tensor) -> Tensor:
    """Every query head of a group times the group's matrix: [B, C, G, N, L, K] -> [B, C, G, N, L, W]."""
    out_BCGNLW: Tensor = (rows_BCGNLK.flatten(3, 4) @ matrix_BCGKW).unflatten(3, rows_BCGNLK.shape[3:5])
    return out_BCGNLW
