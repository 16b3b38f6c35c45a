"""Random numbers for the router's stochastic warm-up, each a function of its purpose.

A generator's state would make routing depend on micro-batches, ranks and recomputation. Here every number is a hash of
(run seed, layer, step, sample, position in the row, expert), so a resumed or differently split run draws the same ones.
"""

# B rows   T tokens of a row   N = B * T   E experts

from __future__ import annotations

import math

import torch
from torch import Tensor


def standard_normal(
    seed: int, layer: int | Tensor, step_1: Tensor, samples_B: Tensor, shape: torch.Size, first: int = 0
) -> Tensor:
    """Standard normal numbers of `shape` (N, E), fp32 on the device of `samples_B` (int64, B divides N), for the tokens
    of each row from place `first` on.

    `step_1` is a tensor with one number: it is read on its device, without waiting. `layer` may be an int64 tensor too,
    because a compiler makes a separate graph for each plain number.
    """
    tokens, experts = shape[0] // samples_B.numel(), shape[1]
    device = samples_B.device
    start_1 = torch.full_like(samples_B[:1], _signed(seed * 65_537 % (1 << 64))) + layer
    key_B = _mixed(samples_B + _mixed(step_1.long() + _mixed(start_1)))
    place_T = torch.arange(first, first + tokens, device=device)[:, None] * experts
    place_TE = place_T + torch.arange(experts, device=device)
    bits_BTE = _mixed(key_B[:, None, None] + place_TE)
    # Box-Muller, from the upper and the lower half of 64 bits.
    upper_BTE = ((bits_BTE >> 32) & 0xFFFFFFFF).add(0.5).mul(2.0**-32)
    lower_BTE = (bits_BTE & 0xFFFFFFFF).mul(2.0**-32)
    normal_BTE = (-2.0 * upper_BTE.log()).sqrt() * (2.0 * math.pi * lower_BTE).cos()
    return normal_BTE.reshape(shape)


def _mixed(number: Tensor) -> Tensor:
    """The finaliser of splitmix64: each output bit depends on every bit of `number` (int64, wrapping)."""
    number = number + _signed(0x9E3779B97F4A7C15)
    number = (number ^ _shifted(number, 30)) * _signed(0xBF58476D1CE4E5B9)
    number = (number ^ _shifted(number, 27)) * _signed(0x94D049BB133111EB)
    return number ^ _shifted(number, 31)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def _shifted(number: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's own repeats the sign."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
