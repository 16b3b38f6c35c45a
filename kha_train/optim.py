"""What AdamW sees: parameter groups, and the learning rate of a step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from kha_train.config.schema import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNED_NUMBERS = 8
"""Of bf16 in 16 bytes."""


class AdamW(torch.optim.AdamW):
    """torch's, step for step, without the decorator that imports torch's compiler at the first step: seconds.

    Moments that are kept in bf16 are widened for their step and rounded after it, one parameter group at a time.
    Where a group has an `identity_decay` d, its parameters p decay towards their values in `identities` (of the same
    shape, by parameter): p <- p - lr d (p - identity), before the step, as torch's own decay towards zero is.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        self.identities: dict[torch.Tensor, torch.Tensor] = {}

    def start(self, shares: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
        """Zero moments in `dtype` from the start, so that a checkpoint of any step holds them and memory is taken
        once."""
        for share in shares:
            self.state[share] = {"step": torch.zeros((), dtype=torch.float32, device=share.device)} | {
                name: torch.zeros_like(share, dtype=dtype, requires_grad=False) for name in MOMENTS
            }

    @property
    def steps(self) -> int:
        """How many steps were taken: the bias correction depends on it."""
        counts = {int(state["step"]) for state in self.state.values()}
        assert len(counts) == 1, f"parameter groups disagree about the step: {counts}"
        return counts.pop()

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    # torch's also takes a closure, which this one refuses.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None, "a loss is never computed again here"
        groups = self.param_groups
        for group in groups:
            self.param_groups = [group]
            self._decay_to_identity(group)
            narrow = [
                (self.state[parameter], name)
                for parameter in group["params"]
                if parameter.grad is not None
                for name in MOMENTS
                if name in self.state[parameter] and self.state[parameter][name].dtype == torch.bfloat16
            ]
            kept = [state[name] for state, name in narrow]
            for state, name in narrow:
                state[name] = state[name].float()
            inspect.unwrap(torch.optim.AdamW.step)(self)
            for (state, name), moment in zip(narrow, kept, strict=True):
                state[name] = moment.copy_(state[name])
        self.param_groups = groups

    def _decay_to_identity(self, group: dict[str, Any]) -> None:
        decay = group.get("identity_decay", 0.0)
        for parameter in group["params"] if decay else ():
            if parameter.grad is not None and parameter in self.identities:
                parameter.lerp_(self.identities[parameter], group["lr"] * decay)


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


def learning_rate(optim: OptimSection, step: int, steps: int) -> float:
    """The rate of optimiser step `step` (1 .. `steps`): linear warm-up to `lr`, then the schedule to `final` x lr.

    `cosine` falls over all steps after the warm-up; `wsd` stays at `lr` and falls linearly over the last `decay`.
    """
    schedule = optim.schedule
    floor = optim.lr * schedule.final
    warmup_steps = round(schedule.warmup * steps)
    if step <= warmup_steps:
        return optim.lr * step / warmup_steps
    if schedule.name == "cosine":
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = round(schedule.decay * steps)
    remaining = min(max(steps - step, 0), decay_steps)
    return floor + (optim.lr - floor) * (remaining / decay_steps if decay_steps else 1.0)


def _layer(name: str) -> str:
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else "outside layers"
