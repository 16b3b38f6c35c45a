"""The contract of an optimiser: it steps the flat fp32 shares that an engine owns, one parameter group after another.

A share is a 1-D part of one or many parameters (whole, or sharded and padded), so a step must treat every number
separately, or ask in `lay_out` where the numbers belong. An optimiser derives from `ShareOptimizer` and implements
`step_share`; its options name its states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kha_train.distributed import World
from kha_train.optim.groups import interaction_settings, parameter_groups
from kha_train.variants.optimizer import MASTER, LinearMap, OptimSection

Groups = list[dict[str, Any]]
"""Parameter groups in torch's form: `params`, `name`, `weight_decay` and further fields for the optimiser."""


class Part(NamedTuple):
    """Elements `start` .. `start + length` of the flattened parameter `name`, at `offset` of a share."""

    name: str
    start: int
    length: int
    offset: int


class ShareOptimizer(torch.optim.Optimizer):
    """An optimiser of flat shares, made of parameter groups and `options`. The engine sets `lr` of each group.

    States stored in bf16 are widened for a step and rounded after it, one parameter group at a time. Where a group has
    an `identity_decay` d, its parameters p decay towards their values in `identities` (of the same shape, by
    parameter): p <- p - lr d (p - identity), before the step, like decay towards zero.
    """

    param_groups: Groups
    options: OptimSection
    identities: dict[Tensor, Tensor]
    stepped: Callable[[Tensor, Tensor], None] | None
    """Called after a share was stepped, with the share and what changed in it. Costs a copy of the shares of one
    parameter group at a time."""

    def __init__(self, groups: Groups, options: OptimSection) -> None:
        super().__init__(groups, {"lr": options.lr})
        self.adopt(options)

    def adopt(self, options: OptimSection) -> None:
        """Store `options`, for a class that is built by another `__init__`."""
        self.options, self.identities, self.stepped = options, {}, None

    @staticmethod
    def group(
        named: Iterable[tuple[str, torch.nn.Parameter]],
        options: OptimSection,
        apart: Collection[str] = (),
        shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        maps: Mapping[str, LinearMap] = MappingProxyType({}),
    ) -> Groups:
        """The parameter groups of the `named` parameters, with those in `apart` treated by `optim.interaction_*`. See
        `parameter_groups`. `maps` are the parameters that are linear maps of features.
        """
        return parameter_groups(named, options.weight_decay, apart, interaction_settings(options), shapes)

    def lay_out(
        self,
        parts: Sequence[tuple[Tensor, Sequence[Part]]],
        shapes: Mapping[str, tuple[int, ...]],
        maps: Mapping[str, LinearMap],
        world: World,
    ) -> None:
        """Called once, before `start`, for an optimiser that must know which numbers belong together: this rank's
        shares, in the same order on every rank, with the `parts` of parameters in each; the global `shapes` of all
        parameters; and which are linear `maps`. Collective.
        """

    def states_of(self, share: Tensor) -> tuple[str, ...]:
        """The names of the states of `share`."""
        return self.options.states

    def start(self, shares: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Allocate zero states in `dtype` now, so that a checkpoint of any step holds them and memory is allocated
        once.
        """
        for share in shares:
            self.state[share] = {"step": torch.zeros((), dtype=torch.float32, device=share.device)} | {
                name: torch.zeros_like(share, dtype=dtype, requires_grad=False) for name in self.states_of(share)
            }

    def kept(self, share: Tensor) -> dict[str, Tensor]:
        """What a checkpoint stores of `share`, as live whole tensors by kind: the master itself and, from `start` on,
        every state.
        """
        states = {name: self.state[share][name] for name in self.states_of(share)} if share in self.state else {}
        return {MASTER: share.detach()} | states

    @property
    def steps(self) -> int:
        """The number of steps taken, the same for every share."""
        counts = {int(state["step"]) for state in self.state.values()}
        assert len(counts) == 1, f"parameter groups disagree about the step: {counts}"
        return counts.pop()

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may return a loss
        """One step of every share that has a gradient."""
        assert closure is None, "closures are not supported"
        groups = self.param_groups
        for group in groups:
            self.param_groups = [group]
            before = self._copied(group) if self.stepped else []
            self._decay_to_identity(group)
            narrow = [
                (self.state[share], name)
                for share in group["params"]
                if share.grad is not None
                for name in self.states_of(share)
                if name in self.state[share] and self.state[share][name].dtype == torch.bfloat16
            ]
            kept = [state[name] for state, name in narrow]
            for state, name in narrow:
                state[name] = state[name].float()
            self.step_group(group)
            for (state, name), moment in zip(narrow, kept, strict=True):
                state[name] = moment.copy_(state[name])
            if self.stepped:
                for share, copy in before:
                    self.stepped(share, torch.sub(share.detach(), copy, out=copy))
        self.param_groups = groups

    def step_group(self, group: dict[str, Any]) -> None:
        """Count the step, and step every share of `group` that has a gradient."""
        for share in group["params"]:
            if share.grad is not None:
                self.state[share]["step"] += 1
                self.step_share(share, share.grad, self.state[share], group)

    @abstractmethod
    def step_share(self, share: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Step `share` (1-D, fp32) in place by `gradient`, and its `state` with it: a tensor of the same shape for each
        of `states_of(share)`, fp32 here, and `step`, the number of this step from 1 on. `group` has `lr` and
        `weight_decay`."""

    @staticmethod
    def _copied(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        return [(share, share.detach().clone()) for share in group["params"] if share.grad is not None]

    def _decay_to_identity(self, group: dict[str, Any]) -> None:
        decay = group.get("identity_decay", 0.0)
        for share in group["params"] if decay else ():
            if share.grad is not None and share in self.identities:
                share.lerp_(self.identities[share], group["lr"] * decay)
