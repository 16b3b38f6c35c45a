"""Rotary position embedding of the first 2R dimensions of a head, rotate-half layout: dimension i is paired with i
+ R.
"""

# B batch   T tokens   P positions in the table   H heads   K head width   R rotation planes: at most K / 2

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.model.init import DeclaredModule


class Rotary(NamedTuple):
    """Cosines and sines of the angles of every token of a batch, fp32; computed once per forward, shared by all
    layers.
    """

    cos_BTR: Tensor
    sin_BTR: Tensor


def rotary_table(positions: int, turned: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, turned / 2] of position * theta^(-2 i / turned), for an even number of `turned`
    dimensions: computed in fp64 on the CPU, so that every device holds the same fp32 values."""
    assert turned % 2 == 0 and turned >= 2, f"{turned} dimensions cannot be paired"
    exponent_R = torch.arange(0, turned, 2, dtype=torch.float64, device="cpu") / turned
    position_P = torch.arange(positions, dtype=torch.float64, device="cpu")
    angle_PR = torch.outer(position_P, theta**-exponent_R)
    return angle_PR.cos().float(), angle_PR.sin().float()


class RotaryTable(DeclaredModule):
    """The fp32 tables for positions below `positions`, and the look-up by the position of each token."""

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(self, positions: int, turned: int, theta: float) -> None:
        super().__init__()
        for index, name in enumerate(("cos_PR", "sin_PR")):
            fresh = partial(_table_part, positions, turned, theta, index)
            self.declare_buffer(name, (positions, turned // 2), fresh, persistent=False)

    def forward(self, positions_BT: Tensor) -> Rotary:
        """The rotation of each token, from its position (int64) inside its document or row."""
        return Rotary(self.cos_PR[positions_BT], self.sin_PR[positions_BT])


def _table_part(positions: int, turned: int, theta: float, index: int) -> Tensor:
    return rotary_table(positions, turned, theta)[index]


def rotate(x_BTHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotate every head by the token's angles; computed in at least fp32, returned in the dtype of `x_BTHK`. Dimensions
    beyond the tables' 2R pass unchanged.
    """
    cos_BT1R, sin_BT1R = rotary.cos_BTR.unsqueeze(2), rotary.sin_BTR.unsqueeze(2)
    planes = rotary.cos_BTR.shape[-1]
    first_BTHR, second_BTHR, rest_BTHK = x_BTHK.tensor_split((planes, 2 * planes), dim=-1)
    turned_BTHR = first_BTHR * cos_BT1R - second_BTHR * sin_BT1R, second_BTHR * cos_BT1R + first_BTHR * sin_BT1R
    return torch.cat((*turned_BTHR, rest_BTHK), dim=-1).to(x_BTHK.dtype)
