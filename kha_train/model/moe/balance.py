"""Loss-free balancing of expert loads: the update of the selection bias, and figures of how balanced a step was."""

# L layers   E experts   ... any leading dimensions

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def rms_update(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The selection bias after one step: b - rate * (F - 1/E) / RMS(F - 1/E), its mean removed (Su 2025).

    `load_E` counts the tokens each expert received over the whole global batch; F is its share. A perfectly balanced
    (or empty) load leaves the bias as it is. The mean is a gauge: selection sees differences only. Works on [..., E].
    """
    load_E = load_E.to(bias_E.dtype)
    share_E = load_E / load_E.sum(dim=-1, keepdim=True).clamp(min=1.0)
    excess_E = share_E - share_E.mean(dim=-1, keepdim=True)
    rms = excess_E.square().mean(dim=-1, keepdim=True).sqrt()
    moved_E = bias_E - rate * torch.where(rms > 0, excess_E / rms, 0.0)
    return moved_E - moved_E.mean(dim=-1, keepdim=True)


class LoadStatistics(NamedTuple):
    """Balance of one step, as 0-dim fp32 tensors: means over the layers, but for `bias_range`.

    `maxvio` largest load / mean load (1 = balanced) · `load_cv` standard deviation / mean · `dead_fraction` experts
    with no token · `load_entropy` entropy of the shares / log E (1 = balanced) · `bias_range` largest spread of a
    layer's selection bias.
    """

    maxvio: Tensor
    load_cv: Tensor
    dead_fraction: Tensor
    load_entropy: Tensor
    bias_range: Tensor


def load_statistics(load_LE: Tensor, bias_LE: Tensor) -> LoadStatistics:
    """The figures of one step from its loads (whole global batch) and the selection biases, on their device."""
    load_LE = load_LE.float()
    mean_L = load_LE.mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    share_LE = load_LE / load_LE.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy_L = torch.special.entr(share_LE).sum(dim=-1)
    return LoadStatistics(
        maxvio=(load_LE.amax(dim=-1) / mean_L).mean(),
        load_cv=(load_LE.std(dim=-1, correction=0) / mean_L).mean(),
        dead_fraction=(load_LE == 0).float().mean(),
        load_entropy=entropy_L.mean() / math.log(max(load_LE.shape[-1], 2)),
        bias_range=(bias_LE.amax(dim=-1) - bias_LE.amin(dim=-1)).amax(),
    )
