"""What heads do with each other, as functions of tensors: Knocking-Heads Attention (KHA, arXiv 2510.23052) and explicit
multi-head attention (MEA, arXiv 2601.19611). The trainer's own decoder computes the same functions.
"""

# B batch   T tokens (any other leading dimensions may be in place of both)   H, I, O heads
# K, W head width before and after   D model width   N = H or H * W

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NORM_EPS = 1e-5
"""The eps of the normalised heads from which MEA takes its norm (Differential Transformer, arXiv 2410.05258)."""


def through(x_BTHK: Tensor, matrix: Tensor) -> Tensor:
    """Every head times `matrix` [K, W] or, with a matrix of its own for each head, [H, K, W]: [B, T, H, W]."""
    if matrix.ndim == 2:
        return x_BTHK @ matrix
    return torch.einsum("...hk,hkw->...hw", x_BTHK, matrix)


def perceptron(x_BTHK: Tensor, up: Tensor, gate: Tensor, down: Tensor | None = None) -> Tensor:
    """2 ((x W_up) * sigmoid(x W_gate)) W_down (KHA eq 9); without `down`, the input of that last product. All matrices
    are [K, K] or [H, K, K].
    """
    hidden_BTHK = 2.0 * through(x_BTHK, up) * torch.sigmoid(through(x_BTHK, gate))
    return hidden_BTHK if down is None else through(hidden_BTHK, down)


def gated(x_BTHK: Tensor, gate: Tensor) -> Tensor:
    """2 x * sigmoid(x W_gate), the gate of the perceptron alone (KHA table 2). `gate` is [K, K] or [H, K, K]."""
    return 2.0 * x_BTHK * torch.sigmoid(through(x_BTHK, gate))


def composed(x_BTIK: Tensor, across_IO: Tensor) -> Tensor:
    """Head o is the sum over i of head i times across[i, o] (MEA eq 10): [B, T, O, K]."""
    return torch.einsum("...ik,io->...ok", x_BTIK, across_IO)


def gates(x_BTD: Tensor, weight_ND: Tensor, heads: int) -> Tensor:
    """sigmoid(x W), by which the outputs of `heads` heads are multiplied (Qiu et al. 2025, arXiv 2505.06708): one
    number for each head [B, T, H, 1], or one for each of its dimensions [B, T, H, W].
    """
    gates_BTHW: Tensor = torch.sigmoid(functional.linear(x_BTD, weight_ND)).unflatten(-1, (heads, -1))
    return gates_BTHW


def normalised(x_BTHK: Tensor, gain_K: Tensor) -> Tensor:
    """The RMSNorm of every head's output, with one gain for all heads (MEA eq 12)."""
    return functional.rms_norm(x_BTHK, (x_BTHK.shape[-1],), gain_K, NORM_EPS)
