"""Muon (Jordan et al. 2024): momentum whose matrices are made nearly orthogonal, for the linear maps inside layers.

A step keeps the order that the gate and clipping need: the norm, clipping and momentum act on numbers, and only the
optimiser's own step sees matrices (`matrices.py`). Each expert is a matrix, and so is each of the maps that are fused
in one parameter. The rest is stepped by AdamW: embedding, head, router, vectors, and the matrices through which heads
exchange information. An update of Muon has the root mean square of one of AdamW, so one rate and decay serve both
(Liu et al. 2025, arXiv 2502.16982, section 2.2).
"""

# N matrices   A rows   C columns   S the smaller of both

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kha_train.distributed import World
from kha_train.optim.adamw import AdamW
from kha_train.optim.contract import Groups, Part, ShareOptimizer
from kha_train.optim.matrices import ShareMatrices, lay_out_matrices
from kha_train.variants.optimizer import ORTHOGONALISED_TOGETHER, LinearMap, MuonOptions, OptimSection

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic x -> a x + b x^3 + c x^5 on singular values, chosen by Jordan for its slope at 0."""
LEAST_NORM = 1e-7
"""A matrix of a smaller norm is divided by this: without a gradient, its update fades instead of keeping its size."""
ADAMW_RMS = 0.2
"""The usual root mean square of an update of AdamW."""


class Muon(AdamW):
    """Muon for the shares of linear maps, AdamW for all others.

    For a map W with gradient g: m <- momentum m + (1 - momentum) g, u = momentum m + (1 - momentum) g (with `nesterov`,
    else m), W <- W - lr (weight_decay W + 0.2 sqrt(max(A, C)) O), where O is u with singular values near 1.
    """

    options: MuonOptions

    def __init__(self, groups: Groups, options: MuonOptions) -> None:
        super().__init__(groups, options)
        self._matrices: dict[Tensor, ShareMatrices] = {}
        self._maps: Mapping[str, LinearMap] = {}

    @staticmethod
    def group(
        named: Iterable[tuple[str, torch.nn.Parameter]],
        options: OptimSection,
        apart: Collection[str] = (),
        shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        maps: Mapping[str, LinearMap] = MappingProxyType({}),
    ) -> Groups:
        """See `ShareOptimizer.group`. Each group is split into its linear maps and the others; both keep its name."""
        named = list(named)
        are_maps = {id(parameter) for name, parameter in named if name in maps}
        groups = []
        for group in ShareOptimizer.group(named, options, apart, shapes):
            for chosen in (True, False):
                params = [parameter for parameter in group["params"] if (id(parameter) in are_maps) == chosen]
                groups += [{**group, "params": params}] if params else []
        return groups

    def lay_out(
        self,
        parts: Sequence[tuple[Tensor, Sequence[Part]]],
        shapes: Mapping[str, tuple[int, ...]],
        maps: Mapping[str, LinearMap],
        world: World,
    ) -> None:
        """See `ShareOptimizer.lay_out`."""
        found = lay_out_matrices([held for _, held in parts], shapes, maps, world)
        self._matrices = {share: matrices for (share, _), matrices in zip(parts, found, strict=True) if matrices}
        self._maps = maps

    def states_of(self, share: Tensor) -> tuple[str, ...]:
        """See `ShareOptimizer.states_of`."""
        return self.options.states_of(share in self._matrices)

    def step_group(self, group: dict[str, Any]) -> None:
        """See `ShareOptimizer.step_group`. No group has shares of both kinds."""
        if any(share in self._matrices for share in group["params"]):
            ShareOptimizer.step_group(self, group)
        else:
            super().step_group(group)

    def step_share(self, share: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """See `ShareOptimizer.step_share`. Collective where ranks share a matrix."""
        rate, kept = group["lr"], self.options.momentum
        momentum = state["momentum"].lerp_(gradient, 1 - kept)
        update = gradient.lerp(momentum, kept) if self.options.nesterov else momentum.clone()
        self._matrices[share].transform(update, self._orthogonalise)
        share.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)

    def _orthogonalise(self, u_NAC: Tensor, name: str) -> None:
        together = max(1, ORTHOGONALISED_TOGETHER // math.prod(u_NAC.shape[1:]))
        dtype = torch.bfloat16 if self.options.iteration_dtype == "bf16" else torch.float32
        shape = self._maps[name]
        for some_NAC in u_NAC.split(together):
            for map_NAC in some_NAC.split(list(shape.sizes or [some_NAC.shape[shape.along]]), dim=shape.along):
                scale = ADAMW_RMS * math.sqrt(max(map_NAC.shape[1:]))
                map_NAC.copy_(orthogonal(map_NAC.to(dtype), self.options.iterations)).mul_(scale)


def orthogonal(x_NAC: Tensor, iterations: int) -> Tensor:
    """Each matrix with singular values moved near 1 by Newton and Schulz's iteration, in the dtype of `x_NAC`."""
    a, b, c = COEFFICIENTS
    is_tall = x_NAC.shape[1] > x_NAC.shape[2]
    x_NAC = x_NAC.mT if is_tall else x_NAC
    x_NAC = x_NAC / x_NAC.norm(dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(iterations):
        gram_NSS = x_NAC @ x_NAC.mT
        x_NAC = torch.baddbmm(x_NAC, torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c), x_NAC, beta=a)
    return x_NAC.mT if is_tall else x_NAC
