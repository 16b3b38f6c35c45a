"""Figures of attention heads from streaming sums in float64: their outputs, their weights over tokens, their gates.

Batches of tokens are added one by one, so memory does not depend on their number. `MeanSums` comes first: centred
figures need the mean of every head.
"""

# N tokens   H, I heads   W value head width   V = H * W   Q query tokens   U attended tokens   K width of a gate

from __future__ import annotations

import torch
from torch import Tensor

from kha_train.analysis.heads.inspection import AttentionWeights, Gate, HeadOutputs

FEWEST_ATTENDED = 2
"""A query that attends to one token alone has no choice, and is left out of every mean of attention weights."""

CLOSED = 0.1
"""A gate below this lets almost nothing through."""


class MeanSums:
    """The mean output of each head."""

    def __init__(self) -> None:
        self._count, self._total_HW = 0, torch.zeros((), dtype=torch.float64)

    def add(self, out_NHW: Tensor) -> None:
        """Add the outputs of some tokens."""
        self._count += len(out_NHW)
        self._total_HW = self._total_HW + out_NHW.double().sum(dim=0)

    def mean_HW(self) -> Tensor:
        """The means."""
        return self._total_HW / self._count


class OutputSums:
    """What `HeadOutputs` needs of the outputs of a layer whose mean is `mean_HW`."""

    def __init__(self, mean_HW: Tensor) -> None:
        heads, width = mean_HW.shape
        self._count, self._mean_HW = 0, mean_HW
        self._scatter_VV = torch.zeros(heads * width, heads * width, dtype=torch.float64)
        self._cosine_HH, self._centred_HH = torch.zeros(2, heads, heads, dtype=torch.float64)

    def add(self, out_NHW: Tensor) -> None:
        """Add the outputs of some tokens."""
        out_NHW = out_NHW.double()
        apart_NHW = out_NHW - self._mean_HW
        apart_NV = apart_NHW.flatten(1)
        self._count += len(out_NHW)
        self._scatter_VV += apart_NV.T @ apart_NV
        self._cosine_HH += _cosines(out_NHW)
        self._centred_HH += _cosines(apart_NHW)

    def figures(self) -> HeadOutputs:
        """The figures of all tokens. An output of zeros has the cosine 0 with every other."""
        heads, width = self._mean_HW.shape
        scatter_HWIW = self._scatter_VV.view(heads, width, heads, width)
        alignment_HH = scatter_HWIW.square().sum(dim=(1, 3))
        own_HWW = torch.stack([scatter_HWIW[head, :, head] for head in range(heads)])
        norms_H = alignment_HH.diagonal().sqrt()
        trace_H = own_HWW.diagonal(dim1=1, dim2=2).sum(dim=1)
        floor_H = trace_H / norms_H
        cosine_HH, centred_HH = self._cosine_HH / self._count, self._centred_HH / self._count
        return HeadOutputs(
            width,
            _square(cosine_HH),
            _square(centred_HH),
            _square(alignment_HH / torch.outer(norms_H, norms_H)),
            _square(torch.outer(floor_H, floor_H) / max(1, self._count - 1)),
            effective_rank(cosine_HH),
            effective_rank(centred_HH),
            tuple(effective_rank(own_WW) for own_WW in own_HWW),
        )


class WeightSums:
    """What `AttentionWeights` needs of the weights of a layer."""

    def __init__(self, heads: int) -> None:
        self.queries = 0
        self._sums = {
            name: torch.zeros(heads, dtype=torch.float64) for name in ("entropy", "distance", "sink", "divergence")
        }

    def add(self, weights_HQU: Tensor, place_Q: Tensor, earlier_Q: Tensor) -> None:
        """Add some query tokens of one row. The weights are over the row's first tokens. `place_Q` (int64) is the place
        of each query in the row, `earlier_Q` the number of tokens of its document before it, at least one.
        """
        weights_HQU = weights_HQU.double()
        mean_QU = weights_HQU.mean(dim=0)
        distance_QU = place_Q[:, None] - torch.arange(weights_HQU.shape[-1])
        first_HQ1 = (place_Q - earlier_Q)[None, :, None].expand(len(weights_HQU), -1, 1)
        negative_HQ = torch.special.xlogy(weights_HQU, weights_HQU).sum(dim=-1)
        crossed_HQ = torch.special.xlogy(weights_HQU, mean_QU).sum(dim=-1)
        added = {
            "entropy": -negative_HQ / torch.log(earlier_Q.double() + 1.0),
            "distance": (weights_HQU * distance_QU).sum(dim=-1),
            "sink": weights_HQU.gather(-1, first_HQ1).squeeze(-1),
            "divergence": negative_HQ - crossed_HQ,
        }
        self.queries += len(place_Q)
        for name, values_HQ in added.items():
            self._sums[name] += values_HQ.sum(dim=-1)

    def figures(self) -> AttentionWeights | None:
        """The means over all queries; None when there was none."""
        if not self.queries:
            return None
        means = {name: tuple((total_H / self.queries).tolist()) for name, total_H in self._sums.items()}
        return AttentionWeights(**means, diversity=sum(means["divergence"]) / len(means["divergence"]))


class GateSums:
    """Mean and deviation of a gate, and the mean derivative of the map that it is part of."""

    def __init__(self) -> None:
        self._tokens = 0
        self._means_H, self._squares, self._closed, self._derivative = torch.zeros(4, dtype=torch.float64)

    def add(self, gates_NHK: Tensor, derivative: Tensor | None = None) -> None:
        """Add the gates of some tokens, and the mean derivative over them if the gate is part of a map of heads."""
        count = len(gates_NHK)
        self._tokens += count
        self._means_H = self._means_H + gates_NHK.mean(dim=2).sum(dim=0)
        self._squares = self._squares + gates_NHK.square().mean(dim=(1, 2)).sum()
        self._closed = self._closed + (gates_NHK < CLOSED).double().mean(dim=(1, 2)).sum()
        if derivative is not None:
            self._derivative = self._derivative + derivative * count

    def figures(self, name: str) -> Gate:
        """The figures of all tokens, for the gate of that name."""
        means_H = self._means_H / self._tokens
        mean = float(means_H.mean())
        variance = float(self._squares / self._tokens) - mean**2
        closed = float(self._closed / self._tokens)
        return Gate(name, mean, max(0.0, variance) ** 0.5, tuple(means_H.tolist()), closed)

    def derivative(self) -> Tensor | None:
        """The mean derivative, of the shape that it was added in; None if there was none."""
        return self._derivative / self._tokens if self._derivative.dim() else None


def effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the eigenvalues as shares of their sum (Roy and Vetterli 2007) of a symmetric matrix
    without negative ones: 1 for one direction, its size for equal ones. nan where there is none.
    """
    if not torch.isfinite(gram).all():
        return float("nan")
    values = torch.linalg.eigvalsh(gram).clamp(min=0.0)
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _cosines(x_NHW: Tensor) -> Tensor:
    """The sum over tokens of the cosine of every pair of heads, [H, H]."""
    unit_NHW = torch.nn.functional.normalize(x_NHW, dim=-1, eps=torch.finfo(torch.float64).tiny)
    unit_HV = unit_NHW.transpose(0, 1).flatten(1)
    return unit_HV @ unit_HV.T


def _square(values_HH: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values_HH.tolist())
