"""The contract of an optimiser's options: the torch-free header of the optimisers in `kha_train/optim`.

Each class holds the fields of an optimiser, checks them, and names the states that are kept for every parameter.
Checkpoints, the memory plan and resume use these declarations, and know no optimiser by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from kha_train.errors import ConfigError, Settings, either

MASTER = "master"
"""The kind of the fp32 weights, besides the states of the optimiser."""
MASTER_BYTES = 4
STATE_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes per element of a state, by `engine.moment_dtype`."""
MOST_BETA2_IN_BF16 = 0.99
"""bf16 has 8 significant bits: a change of less than 1/256 is rounded away."""
ORTHOGONALISED_TOGETHER = 1 << 26
"""Numbers of the matrices that Muon orthogonalises in one batch, to bound the memory of a step."""


class LinearMap(NamedTuple):
    """How a weight that maps features, [..., rows, columns], is composed: of one map, or of several side by side along
    dimension `along` (-2 or -1), which have these `sizes` there.
    """

    along: int = -1
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SurgeSection:
    """A provoked instability: for a `length` from `start` on, shares of `run.steps`, the rate is `factor` times that of
    the schedule, from one step to the next.
    """

    factor: float = 1.0
    start: float = 0.0
    length: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """Learning rate over steps: linear warm-up, then `cosine`, or `wsd` (constant, then linear decay at the end).

    `warmup` and `decay` are shares of `run.steps`, `final` a share of the peak rate. `decay` is read by `wsd` alone. A
    `surge` provokes an instability on purpose.
    """

    name: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1
    surge: SurgeSection = field(default_factory=SurgeSection)


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The fields of every optimiser; `name` selects one, which adds its own fields (see `registry.py`).

    Weight decay is decoupled and applies to matrices; the global gradient norm is clipped to `grad_clip`. The matrices
    through which heads exchange information (of an interaction, the mixes of `talking_heads`) decay by `weight_decay`
    towards `zero` or towards the `identity`, the values that leave heads unchanged (0 for a gate), or do not decay
    (`none`). Their learning rate is `interaction_lr_scale` times that of the others.
    """

    states: ClassVar[tuple[str, ...]] = ()
    """The names of the states that the optimiser keeps for each parameter, as checkpoints use them."""
    map_states: ClassVar[tuple[str, ...] | None] = None
    """Those of a linear map (`LinearMap`), where they are others."""
    name: str = "adamw"
    lr: float
    weight_decay: float = 0.1
    interaction_decay: Literal["zero", "identity", "none"] = "zero"
    interaction_lr_scale: float = 1.0
    grad_clip: float = 1.0
    schedule: ScheduleSection = field(default_factory=ScheduleSection)

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """What a checkpoint stores for each parameter: the fp32 master and every state; where those of maps are others,
        for some of them.
        """
        return tuple(dict.fromkeys((MASTER, *cls.states, *(cls.map_states or ()))))

    @classmethod
    def states_of(cls, is_map: bool) -> tuple[str, ...]:
        """The names of the states of a parameter that is a linear map, or is not."""
        return cls.states if cls.map_states is None or not is_map else cls.map_states

    @classmethod
    def bytes_per_parameter(cls, moment_dtype: str = "fp32", is_map: bool = False) -> int:
        """Bytes of master and states in memory. A checkpoint stores all in fp32."""
        return MASTER_BYTES + len(cls.states_of(is_map)) * STATE_BYTES[moment_dtype]

    @classmethod
    def widened_bytes(cls, moment_dtype: str, is_map: bool = False) -> int:
        """Bytes per parameter of the fp32 copies of its states during a step; none if they are stored in fp32."""
        return 0 if moment_dtype == "fp32" else len(cls.states_of(is_map)) * STATE_BYTES["fp32"]

    @classmethod
    def step_bytes(cls, numbers: int) -> int:
        """Bytes that a step of a share of that many numbers of linear maps allocates, besides widened states."""
        return 0

    def invalid(self) -> ConfigError | None:
        """The error in these options, or None."""
        return None

    def refuses_bf16(self) -> ConfigError | None:
        """Why the states cannot be kept in bf16 (`engine.moment_dtype`), or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(OptimSection):
    """AdamW (Loshchilov and Hutter 2019): `betas` of the first and second moment, `eps` beside the root."""

    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def invalid(self) -> ConfigError | None:
        """A beta is a decay rate."""
        for beta in self.betas:
            if not 0 <= beta < 1:
                return ConfigError("must be a decay rate", field="optim.betas", value=beta, allowed="from 0 to below 1")
        return super().invalid()

    def refuses_bf16(self) -> ConfigError | None:
        """A second moment that changes too slowly for bf16."""
        if self.betas[1] <= MOST_BETA2_IN_BF16:
            return None
        return ConfigError(
            "a second moment that changes by less than 1/256 of itself per step does not change at all in bf16",
            field="optim.betas",
            value=list(self.betas),
            allowed=f"a second beta of at most {MOST_BETA2_IN_BF16}",
            fix=either(Settings(f"optim.betas=[{self.betas[0]},0.95]"), Settings("engine.moment_dtype=fp32")),
        )


@dataclass(frozen=True, kw_only=True)
class MuonOptions(AdamWOptions):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the linear maps of layers, AdamW for the rest.

    The update of a map is its `momentum` (with `nesterov`, that of the next step), made nearly orthogonal by
    `iterations` of Newton and Schulz, computed in `iteration_dtype`.
    """

    map_states: ClassVar[tuple[str, ...] | None] = ("momentum",)
    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    iteration_dtype: Literal["fp32", "bf16"] = "fp32"

    @classmethod
    def step_bytes(cls, numbers: int) -> int:
        """The update; and of the matrices orthogonalised together a copy, the next one, their Gram matrices and the
        polynomial of these, which are at most as large.
        """
        return 4 * (numbers + 4 * min(numbers, ORTHOGONALISED_TOGETHER))

    def invalid(self) -> ConfigError | None:
        """The momentum is a decay rate."""
        if 0 <= self.momentum < 1:
            return super().invalid()
        return ConfigError(
            "must be a decay rate", field="optim.momentum", value=self.momentum, allowed="from 0 to below 1"
        )
