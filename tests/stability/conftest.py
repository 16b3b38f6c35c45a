"""Small curves for the tests of this room."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kha_train.stability.events import Observation


@pytest.fixture(scope="session")
def calm() -> Callable[..., list[float]]:
    """`calm(steps, seed=0, level=3.0)`: a level with Gaussian noise of 0.02."""

    def make(steps: int, seed: int = 0, level: float = 3.0) -> list[float]:
        source = random.Random(seed)
        return [source.gauss(level, 0.02) for _ in range(steps)]

    return make


@pytest.fixture(scope="session")
def observed() -> Callable[..., list[Observation]]:
    """`observed(losses, norms=None)`: the losses as steps 1, 2, ... of 1,000 tokens and 8 samples each."""

    def make(losses: list[float], norms: list[float] | None = None) -> list[Observation]:
        norms = norms or [1.0 + 0.01 * (step % 7) for step in range(len(losses))]
        return [
            Observation(step, loss, norm, 1000 * step, 1e-3, 8 * (step - 1), 8 * step - 1)
            for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
        ]

    return make
