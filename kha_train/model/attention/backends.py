"""softmax(QK^T / sqrt(K)) V with causal order, grouped heads and document isolation: one signature, several backends.

`eager` says what is computed; every other backend is its twin and is tested against it. Which documents a row holds is
worked out once a forward (`lay_out_documents`) and shared by all layers. Nothing here waits for the device: whether a
row is split is read from the *shape* of `cu_seqlens_S`.
"""

# B batch   T tokens (U: attended tokens)   H query heads   G key/value heads   N = H / G
# K, W key and value head width   S document borders: row and document starts and the end, over the flattened B*T tokens

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Documents(NamedTuple):
    """Who may attend to whom. `mask_B1TU` (bool, True = may attend) is None when every row is one document: plain
    causal order says it all. `cu_seqlens_S` (int32) and `max_seqlen` say the same for kernels of variable length."""

    cu_seqlens_S: Tensor
    max_seqlen: int
    mask_B1TU: Tensor | None


Backend = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


def lay_out_documents(
    batch: int, tokens: int, device: torch.device, cu_seqlens_S: Tensor | None = None, max_seqlen: int | None = None
) -> Documents:
    """The documents of a batch of `batch` rows of `tokens`; without `cu_seqlens_S` each row is one document.

    `cu_seqlens_S` starts with 0, ends with B*T and holds every row start, so it has B + 1 entries exactly when no
    document ends inside a row.
    """
    if cu_seqlens_S is None:
        cu_seqlens_S = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    if max_seqlen is None:
        max_seqlen = tokens
    if cu_seqlens_S.numel() == batch + 1:
        return Documents(cu_seqlens_S, max_seqlen, None)
    every_token = torch.arange(batch * tokens, dtype=torch.int32, device=device)
    document_BT = torch.searchsorted(cu_seqlens_S, every_token, right=True).view(batch, tokens)
    same_BTU = document_BT[:, :, None] == document_BT[:, None, :]
    return Documents(cu_seqlens_S, max_seqlen, (same_BTU & _causal_TU(tokens, device)).unsqueeze(1))


def eager(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor, documents: Documents) -> Tensor:
    """The formula, with all scores held; softmax in at least fp32. Query head h reads key/value head h // N."""
    batch, tokens, heads, width = q_BTHK.shape
    groups = k_BTGK.shape[2]
    mask = _causal_TU(tokens, q_BTHK.device) if documents.mask_B1TU is None else documents.mask_B1TU.unsqueeze(1)
    q_BTGNK = q_BTHK.reshape(batch, tokens, groups, heads // groups, width)
    scores_BGNTU = torch.einsum("btgnk,bugk->bgntu", q_BTGNK, k_BTGK) * width**-0.5
    scores_BGNTU = scores_BGNTU.to(torch.promote_types(scores_BGNTU.dtype, torch.float32))
    weights_BGNTU = scores_BGNTU.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v_BTGW.dtype)
    return torch.einsum("bgntu,bugw->btgnw", weights_BGNTU, v_BTGW).flatten(2, 3)


def sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor, documents: Documents) -> Tensor:
    """torch's scaled_dot_product_attention: its causal kernel for unsplit rows, a mask for rows of several documents.

    With a mask the key/value heads are repeated, because torch's masked CUDA kernel takes no grouped heads and would
    fall back to holding all scores.
    """
    q_BHTK, k_BGUK, v_BGUW = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGW.transpose(1, 2)
    if documents.mask_B1TU is None:
        out_BHTW = functional.scaled_dot_product_attention(q_BHTK, k_BGUK, v_BGUW, is_causal=True, enable_gqa=True)
    else:
        repeats = q_BTHK.shape[2] // k_BTGK.shape[2]
        k_BHUK, v_BHUW = k_BGUK.repeat_interleave(repeats, dim=1), v_BGUW.repeat_interleave(repeats, dim=1)
        out_BHTW = functional.scaled_dot_product_attention(q_BHTK, k_BHUK, v_BHUW, attn_mask=documents.mask_B1TU)
    return out_BHTW.transpose(1, 2)


BACKENDS: dict[str, Backend] = {"eager": eager, "sdpa": sdpa}


def _causal_TU(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
