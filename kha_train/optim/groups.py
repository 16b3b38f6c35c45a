"""The parameter groups of an optimiser: which parameters are stepped with the same settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from kha_train.config.constants import ALIGNED_NUMBERS
from kha_train.variants.optimizer import OptimSection


def interaction_settings(optim: OptimSection) -> dict[str, Any]:
    """The settings in which the groups of interaction parameters differ: the factor on the learning rate, and the decay
    towards zero and towards the identity. Empty if they do not differ: then these parameters have no groups of their
    own.
    """
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
    """One group for the matrices of each layer, one for those outside layers, one for all vectors. The parameters in
    `apart` get a second group per layer, with other `settings` (see `interaction_settings`), unless `settings` is
    empty. `shapes` has the global shape of a parameter by name, where an engine keeps it in another form.

    Matrices decay, vectors (norm gains) do not. There is one group per layer, because ZeRO 1 and 2 copy the gradients
    of one whole group to fp32 inside the step: a single group would copy the whole model at once.

    ZeRO 1 and 2 concatenate a group's parameters in one tensor, and a grouped GEMM on CUDA needs matrices at multiples
    of 16 bytes: small matrices of an odd size come last, so that they shift no other.
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
