"""Norms of gradients and updates per layer, every `telemetry.layer_statistics_every` steps.

The block computes the norms of activations. Each rank sums squares over its own part of the parameters, so stage and
world size change nothing. Parameters outside layers (embedding, head, last norm) are left out.
"""

# L layers

from __future__ import annotations

import re

import torch
from torch import Tensor

from kha_train.config.schema import RunConfig
from kha_train.engine.contract import Engine
from kha_train.metric import Metric
from kha_train.model.observed import Values

GRAD_NORM = Metric(
    "layer/grad_norm", "1", "L2 norm of the gradient of a layer, before clipping", combine="norm", layers="max"
)
UPDATE_NORM = Metric(
    "layer/update_norm",
    "1",
    "L2 norm of what the step changed in the fp32 weights of a layer, weight decay included; not on skipped steps",
    combine="norm",
    layers="max",
)
METRICS = (GRAD_NORM, UPDATE_NORM)
DECLARED = {metric.name: metric for metric in METRICS}
_LAYER = re.compile(r"blocks\.([0-9]+)\.")


def is_due(config: RunConfig, step: int) -> bool:
    """Whether the record of `step` has layer statistics."""
    every = config.telemetry.layer_statistics_every
    return every > 0 and step % every == 0


class LayerSquares:
    """Sums of squares of parts of parameters, per layer, on the device."""

    def __init__(self, engine: Engine) -> None:
        self._squares_L = torch.zeros(engine.config.model.layers, dtype=torch.float64, device=engine.world.device)

    @torch.no_grad()
    def add(self, name: str, part: Tensor) -> None:
        """Add `part` of the parameter `name`, unless it lies outside the layers."""
        if found := _LAYER.match(name):
            norm = torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
            self._squares_L[int(found[1])] += norm.double().square()

    def values(self, metric: Metric) -> Values:
        """The sums as the values of `metric`, for this rank alone."""
        return {metric.name: self._squares_L}


def gradient_norms(engine: Engine) -> Values:
    """The values of `layer/grad_norm` on this rank, between the last micro-batch and the step."""
    squares = LayerSquares(engine)
    for name, part in engine.gradients():
        squares.add(name, part)
    return squares.values(GRAD_NORM)
