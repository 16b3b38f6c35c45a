"""Copies tokens into the order of their experts, and sums a token's copies: with Triton, and with torch alone.

`permute` and `combine` are each other's transpose, so each is the other's backward.
"""

# N tokens   D model width   J experts per token   M = N * J routed copies, sorted by expert

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kha_train.model.kernels.launch import Call, Launch

COLUMNS = 256
LAUNCH = Launch(rows=4, warps=4, stages=1, resident=8)


def permute_torch(x_ND: Tensor, order_M: Tensor, home_NJ: Tensor) -> Tensor:
    """[M, D]: row m is a copy of token `order_M[m] // J`."""
    return x_ND.index_select(0, order_M.div(home_NJ.shape[1], rounding_mode="floor"))


def combine_torch(y_MD: Tensor, home_NJ: Tensor) -> Tensor:
    """[N, D]: row n is the sum of the rows `home_NJ[n]`, in that order and without a copy of them."""
    return functional.embedding_bag(home_NJ, y_MD, mode="sum")


def permute_triton(x_ND: Tensor, order_M: Tensor, home_NJ: Tensor) -> Tensor:
    """As `permute_torch`; every row is read once and written J times."""
    out_MD = x_ND.new_empty(home_NJ.numel(), x_ND.shape[1])
    permute_call(x_ND.contiguous(), home_NJ, out_MD).start()
    return out_MD


def combine_triton(y_MD: Tensor, home_NJ: Tensor) -> Tensor:
    """As `combine_torch`, summed in at least fp32."""
    out_ND = y_MD.new_empty(home_NJ.shape[0], y_MD.shape[1])
    combine_call(y_MD, home_NJ, out_ND).start()
    return out_ND


def permute_call(x_ND: Tensor, home_NJ: Tensor, out_MD: Tensor) -> Call:
    """The launch that fills `out_MD`. All are contiguous."""
    from kha_train.model.kernels.movement_kernels import spread

    return _call(spread, x_ND, home_NJ, out_MD)


def combine_call(y_MD: Tensor, home_NJ: Tensor, out_ND: Tensor) -> Call:
    """The launch that fills `out_ND`. All are contiguous."""
    from kha_train.model.kernels.movement_kernels import gather_sum

    return _call(gather_sum, y_MD, home_NJ, out_ND)


def _call(kernel: object, source: Tensor, home_NJ: Tensor, out: Tensor) -> Call:
    assert source.is_contiguous() and home_NJ.is_contiguous() and out.is_contiguous()
    tokens, copies = home_NJ.shape
    constants = {"D": source.shape[1], "J": copies, "ROWS": LAUNCH.rows, "COLUMNS": COLUMNS}
    return Call(kernel, -(-tokens // LAUNCH.rows), (source, home_NJ, out, tokens), constants, LAUNCH)
