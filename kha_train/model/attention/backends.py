"""softmax(QK^T scale) V with causal order, grouped heads and document isolation: one signature, several backends.

`eager` is the definition; every other backend is tested against it. The documents of the rows are computed once per
forward (`lay_out_documents`) and shared by all layers. Nothing here waits for the device: whether a row is split is
read from the *shape* of `cu_seqlens_S`. `variants/backends.py`, which needs no torch, says what each backend supports;
`config/resolve.py` selects one for a device.
"""

# B batch   T tokens (U: attended tokens)   H query heads   G key/value heads   N = H / G   J = 1 or H
# K, W key and value head width   M = B * T
# S document borders: row and document starts and the end, over the flattened B*T tokens

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion

from kha_train.distributed import Caught


class Documents(NamedTuple):
    """Which tokens may attend to which. `mask_BJTU` is None when every row is one document, because causal order is
    enough, and when the kernel reads `cu_seqlens_S`. Otherwise it is bool (True = may attend) or, with biased scores,
    fp32 and added to them (-inf = may not attend). `cu_seqlens_S` (int32) and `max_seqlen` give the same information to
    variable-length kernels; `cu_seqlens_S` is None while decoding, when there are fewer queries than keys.
    """

    cu_seqlens_S: Tensor | None
    max_seqlen: int
    mask_BJTU: Tensor | None


Backend = Callable[[Tensor, Tensor, Tensor, Documents, float], Tensor]
"""(q_BTHK, k_BUGK, v_BUGW, documents, scale) -> [B, T, H, W] in the dtype of v."""


def lay_out_documents(
    batch: int,
    tokens: int,
    device: torch.device,
    cu_seqlens_S: Tensor | None = None,
    max_seqlen: int | None = None,
    slopes_H: Tensor | None = None,
    masked: bool = True,
) -> Documents:
    """The documents of a batch of `batch` rows of `tokens`; without `cu_seqlens_S` each row is one document.

    `cu_seqlens_S` starts with 0, ends with B*T and holds every row start, so it has B + 1 entries exactly when no
    document ends inside a row. `slopes_H` biases the scores by ALiBi. Without `masked` no mask is made: the kernel
    reads `cu_seqlens_S`.
    """
    if cu_seqlens_S is None:
        cu_seqlens_S = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    if max_seqlen is None:
        max_seqlen = tokens
    split = cu_seqlens_S.numel() != batch + 1
    if not masked or (not split and slopes_H is None):
        return Documents(cu_seqlens_S, max_seqlen, None)
    mask_BJTU = causal_TU(tokens, tokens, device)[None, None]
    if split:
        document_BT = document_numbers(cu_seqlens_S, batch, tokens)
        mask_BJTU = mask_BJTU & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
    return Documents(cu_seqlens_S, max_seqlen, _biased(mask_BJTU, slopes_H))


def document_numbers(cu_seqlens_S: Tensor, batch: int, tokens: int) -> Tensor:
    """A number for the document of each token, int64 [B, T]."""
    every_token = torch.arange(batch * tokens, dtype=torch.int32, device=cu_seqlens_S.device)
    return torch.searchsorted(cu_seqlens_S, every_token, right=True).view(batch, tokens)


def lay_out_cached(tokens: int, seen: int, device: torch.device, slopes_H: Tensor | None = None) -> Documents:
    """The documents of rows with one document each: `seen` tokens are cached and `tokens` are new."""
    mask_BJTU = causal_TU(tokens, seen + tokens, device)[None, None]
    return Documents(None, seen + tokens, _biased(mask_BJTU, slopes_H))


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head (ALiBi, arXiv 2108.12409): 2^(-8 h / H) when H is a power of two; otherwise those of the
    power below, and every other one of the power above."""
    below = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
    return slopes + [2.0 ** (-4 * (2 * head + 1) / below) for head in range(heads - below)]


def eager(q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """The formula, with all scores in memory; softmax in at least fp32. Query head h reads key/value head h // N."""
    scores_BHTU = scores(q_BTHK, k_BUGK) * scale
    return weighted_values(masked_softmax(scores_BHTU, documents).to(v_BUGW.dtype), v_BUGW)


def scores(q_BTHK: Tensor, k_BUGK: Tensor) -> Tensor:
    """q . k for every pair of tokens, [B, H, T, U]."""
    groups = k_BUGK.shape[2]
    q_BTGNK = q_BTHK.unflatten(2, (groups, -1))
    return torch.einsum("btgnk,bugk->bgntu", q_BTGNK, k_BUGK).flatten(1, 2)


def masked_softmax(scores_BHTU: Tensor, documents: Documents) -> Tensor:
    """Weights over the tokens that may be attended to, in at least fp32."""
    wide_BHTU = scores_BHTU.to(torch.promote_types(scores_BHTU.dtype, torch.float32))
    mask_BJTU = documents.mask_BJTU
    if mask_BJTU is None:
        queries, attended = scores_BHTU.shape[-2:]
        mask_BJTU = causal_TU(queries, attended, scores_BHTU.device)
    if mask_BJTU.dtype == torch.bool:
        return wide_BHTU.masked_fill(~mask_BJTU, float("-inf")).softmax(dim=-1)
    return (wide_BHTU + mask_BJTU).softmax(dim=-1)


def weighted_values(weights_BHTU: Tensor, v_BUGW: Tensor) -> Tensor:
    """Every head's weighted sum of values, [B, T, H, W]."""
    weights_BGNTU = weights_BHTU.unflatten(1, (v_BUGW.shape[2], -1))
    return torch.einsum("bgntu,bugw->btgnw", weights_BGNTU, v_BUGW).flatten(2, 3)


def sdpa(q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention: its causal kernel for unsplit rows, a mask for rows of several documents.

    Never uses cuDNN, which newer torch releases prefer on Hopper: that is a separate backend, checked before use.
    """
    with sdpa_kernel(_TORCH_KERNELS) if q_BTHK.is_cuda else nullcontext():
        return _scaled_dot_product(q_BTHK, k_BUGK, v_BUGW, documents, scale)


def cudnn(q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """cuDNN's kernel through torch: unsplit rows only (`config/resolve.py` refuses others earlier)."""
    assert documents.mask_BJTU is None, "cudnn supports only unsplit causal rows"
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return _scaled_dot_product(q_BTHK, k_BUGK, v_BUGW, documents, scale)


def _scaled_dot_product(q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """Uses an allowed kernel. With a mask the key/value heads are repeated, because torch's masked CUDA kernel supports
    no grouped heads and would fall back to holding all scores.
    """
    q_BHTK, k_BGUK, v_BGUW = q_BTHK.transpose(1, 2), k_BUGK.transpose(1, 2), v_BUGW.transpose(1, 2)
    attend, mask_BJTU = functional.scaled_dot_product_attention, documents.mask_BJTU
    if mask_BJTU is None:
        return attend(q_BHTK, k_BGUK, v_BGUW, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    repeats = q_BTHK.shape[2] // k_BUGK.shape[2]
    k_BHUK, v_BHUW = k_BGUK.repeat_interleave(repeats, dim=1), v_BGUW.repeat_interleave(repeats, dim=1)
    if mask_BJTU.dtype != torch.bool:
        mask_BJTU = mask_BJTU.to(q_BTHK.dtype)
    return attend(q_BHTK, k_BHUK, v_BHUW, attn_mask=mask_BJTU, scale=scale).transpose(1, 2)


class GroupedWords(TypedDict, total=False):
    """Keyword arguments of torch's variable-length kernel."""

    enable_gqa: bool


def grouped_words(release: TorchVersion) -> GroupedWords:
    """The keyword arguments with which the variable-length kernel accepts fewer key/value heads. torch 2.11 has no such
    argument and accepts them anyway; later releases require it.
    """
    return {"enable_gqa": True} if release >= "2.12" else {}


GROUPED_WORDS = grouped_words(torch.__version__)


def varlen(q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """torch's variable-length flash attention: documents are sequences, and there is no mask."""
    # Importing its file loads Triton.
    from torch.nn.attention.varlen import varlen_attn

    borders_S, longest = documents.cu_seqlens_S, documents.max_seqlen
    assert borders_S is not None, "decoding needs a backend that reads the mask"

    def kernel(q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> Any:
        words: GroupedWords = GROUPED_WORDS if q_MHK.shape[1] != k_MGK.shape[1] else {}
        return varlen_attn(
            q_MHK, k_MGK, v_MGK, borders_S, borders_S, longest, longest,
            scale=scale, window_size=(-1, 0), **words,
        )  # fmt: skip

    return _over_flat_tokens(kernel, q_BTHK, k_BUGK, v_BUGW)


def _flash_attn() -> Any:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash_attn_3() -> Any:
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash_attn_4() -> Any:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


FLASH: dict[str, Callable[[], Any]] = {
    "flash_attn": _flash_attn,
    "flash_attn_3": _flash_attn_3,
    "flash_attn_4": _flash_attn_4,
}
"""Backend -> imports its package and returns the kernel of variable length. All take the same arguments by name."""


def flash_problem(name: str) -> str | None:
    """Why the kernel of a backend in `FLASH` cannot be called here, or None. Tested by importing it: releases 2 and 4
    share a package name but not this function, and one built for another torch fails.
    """
    # A package for another torch, compiler or device raises errors of any kind, and `auto` must do without it.
    with Caught() as caught:
        return None if callable(FLASH[name]()) else "flash_attn_varlen_func is no function"
    error = caught.error
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"its import failed: {error}"


def flash(name: str, q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
    """The kernel of variable length of the flash-attn package that `name` selects."""
    borders_S, longest, attend = documents.cu_seqlens_S, documents.max_seqlen, FLASH[name]()

    def kernel(q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> Any:
        found = attend(
            q_MHK, k_MGK, v_MGK,
            cu_seqlens_q=borders_S, cu_seqlens_k=borders_S, max_seqlen_q=longest, max_seqlen_k=longest,
            softmax_scale=scale, causal=True,
        )  # fmt: skip
        # Some releases also return the logarithms of the sums.
        return found[0] if isinstance(found, tuple) else found

    return _over_flat_tokens(kernel, q_BTHK, k_BUGK, v_BUGW)


_TORCH_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

BACKENDS: dict[str, Backend] = {
    "eager": eager,
    "sdpa": sdpa,
    "cudnn": cudnn,
    "varlen": varlen,
    **{name: partial(flash, name) for name in FLASH},
}


def _over_flat_tokens(kernel: Callable[..., Any], q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor) -> Tensor:
    """Run a kernel over [B * T, heads, width]. These kernels need one width, so narrower values are padded; and the
    numbers of a head side by side in memory, where a composition of heads leaves the heads.
    """
    batch, tokens, _, width = q_BTHK.shape
    value_width = v_BUGW.shape[-1]
    v_BUGK = functional.pad(v_BUGW, (0, width - value_width))
    flat = (x.flatten(0, 1) for x in (q_BTHK, k_BUGK, v_BUGK))
    out_MHK: Tensor = kernel(*(x if x.stride(-1) == 1 else x.contiguous() for x in flat))
    out_BTHK: Tensor = out_MHK.unflatten(0, (batch, tokens))
    return out_BTHK[..., :value_width]


def _biased(mask_BJTU: Tensor, slopes_H: Tensor | None) -> Tensor:
    """The mask unchanged, or with ALiBi's -slope x distance where attention is allowed."""
    if slopes_H is None:
        return mask_BJTU
    queries, keys = mask_BJTU.shape[-2:]
    places_U = torch.arange(keys, dtype=torch.float32, device=mask_BJTU.device)
    distance_TU = places_U[keys - queries :, None] - places_U
    bias_BHTU = -slopes_H[:, None, None] * distance_TU
    return bias_BHTU.masked_fill(~mask_BJTU, float("-inf"))


def causal_TU(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which tokens may attend to which in a row of one document; the queries are the last tokens of the keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
