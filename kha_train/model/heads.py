"""The product of heads with matrices: one for all heads, or one for each."""

# B batch   T tokens   H heads   K, W head width before and after

from __future__ import annotations

import torch
from torch import Tensor


def through(x_BTHK: Tensor, matrix: Tensor) -> Tensor:
    """Every head times `matrix` [K, W] or, with a matrix of its own for each head, [H, K, W]: [B, T, H, W]."""
    if matrix.ndim == 2:
        return x_BTHK @ matrix
    return torch.einsum("bthk,hkw->bthw", x_BTHK, matrix)
