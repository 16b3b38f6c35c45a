"""Which parameters are stepped alike: the parameter groups of an optimiser."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from kha_train.variants.optimizer import OptimSection

ALIGNED_NUMBERS = 8
"""Of bf16 in 16 bytes."""


def interaction_settings(optim: OptimSection) -> dict[str, Any]:
    """What the groups of the parameters through which heads exchange information differ by: the factor on the learning
    rate, and the decay towards zero and towards the identity. Empty when by nothing: then they have no groups."""
    if optim.interaction_decay == "zero" and optim.interaction_lr_scale == 1.0:
        return {}
    decays = {aim: optim.weight_decay if optim.interaction_decay == aim else 0.0 for aim in ("zero", "identity")}
    scale = optim.interaction_lr_scale
    return {"lr_scale": scale, "weight_decay": decays["zero"], "identity_decay": decays["identity"]}


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    weight_decay: float,
    apart: Collection[str] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """One group for the matrices of each layer, one for those outside layers, one for all vectors. The parameters named
    in `apart` have a second group of their layer, with other `settings` (see `interaction_settings`), unless there are
    none. `shapes` has the global shape of a parameter by name, where an engine keeps it in another form.

    Matrices decay, vectors (norm gains) do not. A group a layer, because ZeRO 1 and 2 copy the gradients of one whole
    group to fp32 inside the step: a single group would copy the whole model at once.

    ZeRO 1 and 2 lay a group's parameters end to end in one tensor, and a grouped GEMM on CUDA takes matrices at
    multiples of 16 bytes alone: small matrices of an odd size come last, so that they shift no other.
    """
    groups: dict[str, dict[str, Any]] = {}
    odd: dict[int, bool] = {}
    for name, parameter in named:
        shape = shapes.get(name, tuple(parameter.shape))
        odd[id(parameter)] = math.prod(shape) % ALIGNED_NUMBERS != 0
        key = "vectors" if len(shape) < 2 else _layer(name)
        group: dict[str, Any] = {"name": key, "params": [], "weight_decay": 0.0 if key == "vectors" else weight_decay}
        if settings and name in apart:
            changed = {"lr_scale": settings["lr_scale"]} if key == "vectors" else settings
            key, group = f"{key} apart", {**group, **changed}
        groups.setdefault(key, group)["params"].append(parameter)
    for group in groups.values():
        group["params"].sort(key=lambda parameter: odd[id(parameter)])
    return list(groups.values())


def _layer(name: str) -> str:
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else "outside layers"
