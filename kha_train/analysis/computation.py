"""A trial of a study that is no training run: settings, a rate and a seed go in, figures come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kha_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Computation(ABC):
    """The settings of a trial; a subclass has its own beside these. `rate` and `seed` are those that a study varies,
    `steps` is the scale's budget. `figures` are the names of what `measure` returns.
    """

    figures: ClassVar[tuple[str, ...]]
    rate: float
    seed: int
    steps: int

    @abstractmethod
    def invalid(self) -> ConfigError | None:
        """Why these settings cannot be computed; None if they can."""

    @abstractmethod
    def measure(self) -> Mapping[str, float]:
        """The figures. One that is not finite says that the computation diverged. The same settings give the same."""

    @abstractmethod
    def flops(self) -> float:
        """About how much is computed: what progress and time left are weighed by."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of the largest arrays."""

    @abstractmethod
    def seconds_a_step(self) -> float:
        """The time of a step, from a few steps on made-up data."""
