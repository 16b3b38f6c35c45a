"""Turns what the decoder's modules report, in every micro-batch on every rank, into the entries of a metrics line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kha_train.distributed import World
from kha_train.metric import BY_LAYER, Combine, Metric
from kha_train.model.observed import Values

GREATEST: dict[Combine, float] = {"max": 1.0, "min": -1.0}
"""The ways of combining that reduce to a maximum, each with its sign."""
PAIRS = ("mean", "rms")
"""The ways of combining that need a sum and a number of elements."""


class StepValues:
    """The values of one step, for the metrics `declared` by name: `add` the values of each micro-batch, agree, then
    read the entries. Values stay on the device until the caller fetches the result of `agreed`.
    """

    def __init__(self, declared: Mapping[str, Metric]) -> None:
        self._declared = declared
        self._values: Values = {}

    def add(self, values: Values) -> None:
        """Combine `values` with those of earlier micro-batches."""
        for name, value in values.items():
            self._values[name] = self._combined(name, value.detach().double())

    def agreed(self, world: World) -> Tensor:
        """The values over all ranks in one fp64 vector, equal on every rank; empty when there are none. Collective
        unless it is empty.
        """
        summed, greatest = [torch.zeros(0, dtype=torch.float64, device=world.device)], []
        for name, value in self._values.items():
            how = self._declared[name].combine
            if how in GREATEST:
                # Backends do not agree on whether a reduction keeps the maximum or the nan.
                summed.append(value.isnan().double().flatten())
                greatest.append(torch.where(value.isnan(), -math.inf, GREATEST[how] * value).flatten())
            else:
                counts = how != "last" or world.is_main
                summed.append((value if counts else torch.zeros_like(value)).flatten())
        sums = torch.cat(summed)
        if sums.numel():
            world.sum_(sums)
        return torch.cat([sums, world.max_(torch.cat(greatest))]) if greatest else sums

    def entries(self, agreed: Tensor) -> dict[str, Any]:
        """The entries of the metrics line, from the result of `agreed`, which is now on the host."""
        if not self._values:
            return {}
        names = [name for name in self._values if self._declared[name].combine in GREATEST]
        greatest_size = sum(self._values[name].numel() for name in names)
        numbers = agreed.tolist()
        sums, greatest = iter(numbers[: len(numbers) - greatest_size]), iter(numbers[len(numbers) - greatest_size :])
        found: dict[str, Any] = {}
        for name, value in self._values.items():
            metric = self._declared[name]
            pairs = metric.combine in PAIRS
            layers = [_finished(metric.combine, sums, greatest) for _ in range(value.numel() // (2 if pairs else 1))]
            if metric.layers is None:
                (found[name],) = layers
            else:
                found |= {name: metric.over_layers(layers), name + BY_LAYER: layers}
        return found

    def _combined(self, name: str, value: Tensor) -> Tensor:
        before, how = self._values.get(name), self._declared[name].combine
        if before is None or how == "last":
            return value
        if how in GREATEST:
            return torch.maximum(before, value) if how == "max" else torch.minimum(before, value)
        return before + value


def _finished(how: Combine, sums: Iterator[float], greatest: Iterator[float]) -> float:
    """The next value, taken from the summed or the maximised ones."""
    first = next(sums)
    if how in GREATEST:
        largest = next(greatest)
        return math.nan if first else GREATEST[how] * largest
    if how in PAIRS:
        count = next(sums)
        mean = first / count if count else math.nan
        return math.sqrt(mean) if how == "rms" else mean
    return math.sqrt(first) if how == "norm" else first
