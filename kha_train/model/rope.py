"""Rotary position embedding of the first 2R dimensions of a head, rotate-half layout: dimension i is paired with i
+ R. Its frequencies may be scaled, for rows longer than those that a model was trained on.
"""

# B batch   T tokens   P positions in the table   H heads   K head width   R rotation planes: at most K / 2

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.config.schema import ModelSection
from kha_train.model.init import DeclaredModule


class Rotary(NamedTuple):
    """Cosines and sines of the angles of every token of a batch, times `Scaling.magnitude`, fp32; computed once per
    forward, shared by all layers.
    """

    cos_BTR: Tensor
    sin_BTR: Tensor


class Scaling(NamedTuple):
    """What `model.rope_scaling` does to `frequencies` theta^(-i / R), in radians a token, and to rotated heads.

    `linear` (position interpolation, arXiv 2306.15595) divides all of them by `factor`. `yarn` (arXiv 2309.00071,
    section 3) leaves a dimension as it is that turns `beta_fast` times or more over a row of `original` tokens, divides
    one that turns `beta_slow` times or less, and in between passes from one to the other linearly in the dimension; the
    two borders are rounded outwards to whole dimensions, as in the authors' code, which also decides what happens where
    one of them lies outside of all dimensions. It also multiplies rotated queries and keys by `magnitude`.
    """

    name: str = "none"
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @staticmethod
    def of(model: ModelSection) -> Scaling:
        """That of a configuration."""
        return Scaling(
            model.rope_scaling,
            model.rope_factor,
            model.rope_original_seq_len,
            model.rope_beta_fast,
            model.rope_beta_slow,
            model.rope_attention_factor,
        )

    @property
    def magnitude(self) -> float:
        """The factor of cosines and sines: 1 without `yarn`, else `attention_factor` or 0.1 ln(factor) + 1 (section
        3.4).
        """
        if self.name != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def frequencies(self, frequency_R: Tensor, theta: float) -> Tensor:
        """The scaled ones, of those in fp64 [R]."""
        if self.name == "none":
            return frequency_R
        divided_R = frequency_R / self.factor
        if self.name == "linear":
            return divided_R
        planes = len(frequency_R)
        first = max(math.floor(self._dimension(self.beta_fast, planes, theta)), 0)
        last = min(math.ceil(self._dimension(self.beta_slow, planes, theta)), 2 * planes - 1)
        place_R = torch.arange(planes, dtype=torch.float64, device="cpu")
        share_R = ((place_R - first) / (last - first or 1e-3)).clamp(0, 1)
        return share_R * divided_R + (1 - share_R) * frequency_R

    def _dimension(self, turns: float, planes: int, theta: float) -> float:
        """Which of the dimensions 0 .. R - 1, a real number, turns so many times over a row of `original` tokens."""
        return planes * math.log(self.original / (2 * math.pi * turns)) / math.log(theta)


UNSCALED = Scaling()


def rotary_table(positions: int, turned: int, theta: float, scaling: Scaling = UNSCALED) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, turned / 2] of position * theta^(-2 i / turned), scaled, for an even number of `turned`
    dimensions: computed in fp64 on the CPU, so that every device holds the same fp32 values."""
    assert turned % 2 == 0 and turned >= 2, f"{turned} dimensions cannot be paired"
    exponent_R = torch.arange(0, turned, 2, dtype=torch.float64, device="cpu") / turned
    position_P = torch.arange(positions, dtype=torch.float64, device="cpu")
    angle_PR = torch.outer(position_P, scaling.frequencies(theta**-exponent_R, theta))
    return (scaling.magnitude * angle_PR.cos()).float(), (scaling.magnitude * angle_PR.sin()).float()


class RotaryTable(DeclaredModule):
    """The fp32 tables for positions below `positions`, and the look-up by the position of each token."""

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(self, positions: int, turned: int, theta: float, scaling: Scaling = UNSCALED) -> None:
        super().__init__()
        for index, name in enumerate(("cos_PR", "sin_PR")):
            fresh = partial(_table_part, positions, turned, theta, scaling, index)
            self.declare_buffer(name, (positions, turned // 2), fresh, persistent=False)

    def forward(self, positions_BT: Tensor) -> Rotary:
        """The rotation of each token, from its position (int64) inside its document or row."""
        return Rotary(self.cos_PR[positions_BT], self.sin_PR[positions_BT])


def _table_part(positions: int, turned: int, theta: float, scaling: Scaling, index: int) -> Tensor:
    return rotary_table(positions, turned, theta, scaling)[index]


def rotate(x_BTHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotate every head by the token's angles; computed in at least fp32, returned in the dtype of `x_BTHK`. Dimensions
    beyond the tables' 2R pass unchanged.
    """
    cos_BT1R, sin_BT1R = rotary.cos_BTR.unsqueeze(2), rotary.sin_BTR.unsqueeze(2)
    planes = rotary.cos_BTR.shape[-1]
    first_BTHR, second_BTHR, rest_BTHK = x_BTHK.tensor_split((planes, 2 * planes), dim=-1)
    turned_BTHR = first_BTHR * cos_BT1R - second_BTHR * sin_BT1R, second_BTHR * cos_BT1R + first_BTHR * sin_BT1R
    return torch.cat((*turned_BTHR, rest_BTHK), dim=-1).to(x_BTHK.dtype)
