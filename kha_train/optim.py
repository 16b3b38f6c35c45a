"""What AdamW sees: parameter groups, and the learning rate of a step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch

from kha_train.config.schema import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNED_NUMBERS = 8
"""Of bf16 in 16 bytes."""


class AdamW(torch.optim.AdamW):
    """torch's, step for step, without the decorator that imports torch's compiler at the first step: seconds.

    Moments that are kept in bf16 are widened for their step and rounded after it, one parameter group at a time.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient."""
        assert closure is None, "a loss is never computed again here"
        groups = self.param_groups
        for group in groups:
            self.param_groups = [group]
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


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """One group for the matrices of each layer, one for those outside layers, one for all vectors.

    Matrices decay, vectors (norm gains) do not. A group a layer, because ZeRO 1 and 2 copy the gradients of one whole
    group to fp32 inside the step: a single group would copy the whole model at once.

    ZeRO 1 and 2 lay a group's parameters end to end in one tensor, and a grouped GEMM on CUDA takes matrices at
    multiples of 16 bytes alone: small matrices of an odd size come last, so that they shift no other.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        key = "vectors" if len(_shape(parameter)) < 2 else _layer(name)
        decay = 0.0 if key == "vectors" else weight_decay
        groups.setdefault(key, {"name": key, "params": [], "weight_decay": decay})["params"].append(parameter)
    for group in groups.values():
        group["params"].sort(key=lambda parameter: _shape(parameter).numel() % ALIGNED_NUMBERS != 0)
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


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The global shape, also of a parameter that ZeRO 3 has partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _layer(name: str) -> str:
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else "outside layers"
