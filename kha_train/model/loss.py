"""Cross-entropy of a linear head over a large vocabulary, a chunk of tokens at a time: full logits are never in memory.

With vocabulary 157,184 the fp32 logits of 8192 tokens are 4.8 GiB, and their gradient needs as much again. Here the
forward computes both gradients chunk by chunk, while a chunk's logits exist; the backward only scales them. So the
weight is used only in the forward, and no logits are computed twice.
"""

# N tokens   C tokens of one chunk   D model width   V vocabulary

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kha_train.config.constants import IGNORE_LABEL


class TokenScores(NamedTuple):
    """How well each label was predicted: `nats`, its cross-entropy (at least fp32, 0 where masked), and `hits`, whether
    it had the largest logit (bool, False where masked)."""

    nats: Tensor
    hits: Tensor


@torch.no_grad()
def chunked_token_scores(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> TokenScores:
    """The scores of every label, [N] each; arguments as `chunked_cross_entropy`. Of equal logits the first counts."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    nats_N = torch.zeros(labels_N.shape, dtype=wide, device=x_ND.device)
    hits_N = torch.zeros(labels_N.shape, dtype=torch.bool, device=x_ND.device)
    for start in range(0, x_ND.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        labels_C = labels_N[chunk]
        masked_C = labels_C == IGNORE_LABEL
        log_p_CV = _logits(x_ND[chunk], weight_VD, wide).log_softmax(dim=-1, dtype=wide)
        chosen_C = log_p_CV.gather(-1, labels_C.masked_fill(masked_C, 0).unsqueeze(-1)).squeeze(-1)
        nats_N[chunk] = -chosen_C.masked_fill(masked_C, 0.0)
        hits_N[chunk] = log_p_CV.argmax(dim=-1) == labels_C
    return TokenScores(nats_N, hits_N)


def chunked_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
    """Sum over unmasked labels of -log softmax(x W^T)[label], a scalar in at least fp32.

    `labels_N` is int64, `IGNORE_LABEL` where masked. Gradients come in the dtypes of `x_ND` and `weight_VD`; the
    weight's is accumulated over chunks in at least fp32.
    """
    keep_gradients = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    # `apply` is torch's and has no annotations.
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, labels_N, chunk_tokens, keep_gradients
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int, keep_gradients: bool
    ) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND) if keep_gradients else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if keep_gradients else None
        for start in range(0, x_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            x_CD, labels_C = x_ND[chunk], labels_N[chunk]
            masked_C1 = (labels_C == IGNORE_LABEL).unsqueeze(-1)
            label_C1 = labels_C.unsqueeze(-1).masked_fill(masked_C1, 0)
            # Logits are freed before the gradient is computed.
            log_p_CV = _logits(x_CD, weight_VD, wide).log_softmax(dim=-1, dtype=wide)
            loss -= log_p_CV.gather(-1, label_C1).masked_fill(masked_C1, 0.0).sum()
            if grad_x_ND is not None and grad_weight_VD is not None:
                grad_CV = _logit_gradient(log_p_CV, label_C1).to(x_ND.dtype)
                # A masked row is excluded from both products on the narrow side, never by a pass over the vocabulary.
                grad_x_ND[chunk] = (grad_CV @ weight_VD).masked_fill_(masked_C1, 0.0)
                grad_weight_VD += grad_CV.T @ x_CD.masked_fill(masked_C1, 0.0)
                # The next chunk begins without this one's: three tensors of its size are up to 3 GiB.
                del grad_CV
            del log_p_CV
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        # `out=` scales in fp32 and rounds once, without an fp32 copy as large as the vocabulary.
        scaled_VD = torch.empty_like(grad_weight_VD, dtype=ctx.weight_dtype)
        torch.mul(grad_weight_VD, grad, out=scaled_VD)
        return grad_x_ND * grad, scaled_VD, None, None, None


def _logits(x_CD: Tensor, weight_VD: Tensor, wide: torch.dtype) -> Tensor:
    """On CUDA the product writes its sums in `wide`: a log-softmax of bf16 would begin with such a copy."""
    if x_CD.is_cuda and x_CD.dtype != wide:
        return torch.mm(x_CD, weight_VD.T, out_dtype=wide)
    return x_CD @ weight_VD.T


def _logit_gradient(log_p_CV: Tensor, label_C1: Tensor) -> Tensor:
    """softmax - onehot, written into the memory of the logarithms."""
    grad_CV = log_p_CV.exp_()
    return grad_CV.scatter_add_(-1, label_C1, torch.full_like(log_p_CV[:, :1], -1.0))
