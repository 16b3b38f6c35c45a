"""Projections that can fold a map of heads into their weight: (x W) M = x (W M), exactly, with exact gradients.

Two modules own the factors of such a product, and a parameter may be used only inside the forward of the module that
owns it (sharded engines gather it there). So `Matrix` returns a copy of its small matrix, an ordinary activation
through which the gradient flows back, and the projection multiplies it into its weight inside its own forward.
"""

# B batch   T tokens   D input width   H heads   K, W head width   C latent width   I, O heads before and after

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.heads.maths import composed, through
from kha_train.model.init import DeclaredModule, Identity, Initial, Linear


class HeadMap(NamedTuple):
    """A linear map of heads: `within_KK` multiplies every head from the right, [H, K, K] each head with its own matrix;
    `across_IO` composes heads: head o is the sum over i of head i times across[i, o].
    """

    within_KK: Tensor | None = None
    across_IO: Tensor | None = None

    def apply(self, x_BTHK: Tensor) -> Tensor:
        """Apply the map to activations: the definition."""
        if self.within_KK is not None:
            x_BTHK = through(x_BTHK, self.within_KK)
        if self.across_IO is not None:
            x_BTHK = composed(x_BTHK, self.across_IO)
        return x_BTHK


class Matrix(DeclaredModule):
    """A small square matrix through which heads exchange information, or a stack of one for each head, used by
    neighbouring modules. At `diagonal` times the identity, heads pass unchanged; None: no value has this property.
    `across`: it composes heads, and does not act within each. Without `train` it stays at its initial value: a buffer
    in fp32, and no parameter.
    """

    weight: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        initial: Initial,
        diagonal: float | None,
        *,
        across: bool = False,
        train: bool = True,
    ) -> None:
        super().__init__()
        self.across = across
        declare = self.declare_parameter if train else self.declare_frozen
        declare("weight", shape, initial)
        self.declare_interaction("weight", None if diagonal is None else Identity(diagonal))

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """A copy, because the parameter itself may be freed when this forward ends; in `dtype` if given."""
        weight = self.weight.clone()
        return weight if dtype is None else weight.to(dtype)


class Projection(Linear):
    """x -> heads: [B, T, D] -> [B, T, H, K]. `weight` is [H * K, D]."""

    def __init__(self, inputs: int, heads: int, width: int, initial: Initial) -> None:
        super().__init__(inputs, heads * width, initial)
        self.heads, self.width = heads, width

    def forward(self, x_BTD: Tensor, fold: HeadMap | None = None) -> Tensor:
        """The heads of every token, after applying `fold`, which may make another number of them."""
        x_BTHK: Tensor = torch.nn.functional.linear(x_BTD, self.folded(fold)).unflatten(-1, (-1, self.width))
        return x_BTHK

    def folded(self, fold: HeadMap | None) -> Tensor:
        """The weight [H * K, D] that gives the heads after the map; multiplied in at least fp32."""
        if fold is None:
            return self.weight
        wide = _wide(self.weight)
        weight_HKD: Tensor = self.weight.to(wide).unflatten(0, (self.heads, -1))
        if fold.within_KK is not None:
            # One head at a time, with heads outermost: an einsum makes two transposed copies of the weight.
            weight_HKD = torch.bmm(fold.within_KK.to(wide).mT.expand(self.heads, -1, -1), weight_HKD)
        if fold.across_IO is not None:
            weight_HKD = torch.einsum("ikd,io->okd", weight_HKD, fold.across_IO.to(wide))
        return weight_HKD.flatten(0, 1).to(self.weight.dtype)


class LatentProjection(Projection):
    """A projection of a latent. Decoding attends to the latent itself, so it maps queries to the latent space, and the
    weighted sum back to the heads.
    """

    def queries_to_latent(self, q_BTHK: Tensor, fold: HeadMap | None) -> Tensor:
        """q . (c W) = (q W^T) . c: queries [B, T, H, K] -> [B, T, H, C]. Decoding only: no engine shards its weight."""
        return torch.einsum("bthk,hkc->bthc", q_BTHK, self.folded(fold).unflatten(0, (-1, self.width)))

    def latent_to_heads(self, out_BTHC: Tensor, fold: HeadMap | None) -> Tensor:
        """A weighted sum of latents [B, T, H, C] -> [B, T, H, W], each head with its own part of the weight. Decoding
        only.
        """
        return torch.einsum("bthc,hwc->bthw", out_BTHC, self.folded(fold).unflatten(0, (-1, self.width)))


class OutputProjection(Linear):
    """Head outputs -> residual stream: [B, T, H, W] -> [B, T, D]. `weight` is [D, H * W]."""

    def __init__(self, heads: int, width: int, outputs: int, initial: Initial) -> None:
        super().__init__(heads * width, outputs, initial)
        self.heads = heads

    def forward(self, out_BTHW: Tensor, fold: HeadMap | None = None) -> Tensor:
        """The sum of all heads' contributions, after applying `fold` to each head's output."""
        return torch.nn.functional.linear(out_BTHW.flatten(2), self.folded(fold))

    def folded(self, fold: HeadMap | None) -> Tensor:
        """The weight [D, H * W] for the heads before the map; multiplied in at least fp32."""
        if fold is None:
            return self.weight
        assert fold.within_KK is not None and fold.across_IO is None, "no interaction composes the outputs of heads"
        wide = _wide(self.weight)
        weight_DHK, within = self.weight.to(wide).unflatten(1, (self.heads, -1)), fold.within_KK.to(wide)
        if within.ndim == 2:
            return torch.nn.functional.linear(weight_DHK, within).flatten(1).to(self.weight.dtype)
        # Query heads read the values of their group, which went through its matrix.
        within_HKK = within.repeat_interleave(self.heads // len(within), dim=0)
        folded_HDK = torch.bmm(weight_DHK.transpose(0, 1), within_HKK.mT)
        return folded_HDK.transpose(0, 1).flatten(1).to(self.weight.dtype)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
