"""What the record holds by layer, and of single probed steps, read from a few lines spread over the curve."""

# S sampled steps  L layers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kha_train.analysis.evaluations import Series
from kha_train.analysis.figures import spread
from kha_train.analysis.runs import RunData
from kha_train.foreign.typed import is_number
from kha_train.metric import BY_LAYER
from kha_train.record.reader import METRICS_FILE

SAMPLES = 48
"""Lines read for each interval at which figures are recorded."""
EVERY = ("telemetry.layer_statistics_every", "stability.probe_every")
"""Settings that say at which steps such figures are recorded."""
PROBED = ("kha/from_identity", "attn/max_logit")


@dataclass(frozen=True)
class LayerSeries:
    """A figure of every layer over the run: `values_SL` at `steps_S`."""

    steps_S: np.ndarray
    values_SL: np.ndarray

    def late(self) -> np.ndarray:
        """Each layer's mean over the last quarter of the sampled steps, [L]; nan where none is finite."""
        last_SL = self.values_SL[-max(1, len(self.values_SL) // 4) :]
        finite_SL = np.isfinite(last_SL)
        sums_L = np.where(finite_SL, last_SL, 0.0).sum(axis=0)
        counts_L = finite_SL.sum(axis=0)
        return np.where(counts_L > 0, sums_L / np.maximum(counts_L, 1), np.nan)


@dataclass(frozen=True)
class Sampled:
    """Figures of a run at sampled steps: `by_layer` by the name without its ending, `probed` as recorded."""

    by_layer: dict[str, LayerSeries]
    probed: dict[str, Series]


def read_sampled(run: RunData) -> Sampled:
    """The figures of `run` at some steps. What is no number, or has another number of layers, is left out."""
    lines = run.columns.lines_at(run.path / METRICS_FILE, _steps(run))
    by_layer: dict[str, dict[int, list[float]]] = {}
    probed: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.endswith(BY_LAYER) and _numbers(value):
                by_layer.setdefault(key.removesuffix(BY_LAYER), {})[line["step"]] = [float(one) for one in value]
            elif key in PROBED and _numbers([value]):
                probed.setdefault(key, {})[line["step"]] = float(value)
    return Sampled(
        {name: found for name, values in by_layer.items() if (found := _series(values)) is not None},
        {
            name: Series(np.array(list(values)), np.array(list(values.values()), np.float64))
            for name, values in probed.items()
        },
    )


def _series(values: dict[int, list[float]]) -> LayerSeries | None:
    layers = {len(one) for one in values.values()}
    if len(layers) != 1 or 0 in layers:
        return None
    return LayerSeries(np.array(list(values)), np.array(list(values.values()), np.float64))


def _steps(run: RunData) -> list[int]:
    """The steps to read: spread over the run, and among those of every interval of `EVERY`."""
    steps = run.steps
    chosen = set(spread(steps.tolist(), SAMPLES))
    for key in EVERY:
        every = run.config.get(key)
        if isinstance(every, int) and 0 < every <= steps[-1]:
            chosen |= set(spread(steps[steps % every == 0].tolist(), SAMPLES))
    return sorted(chosen)


def _numbers(values: Any) -> bool:
    """Whether it is a list of numbers that a float can hold."""
    return isinstance(values, Sequence) and all(map(is_number, values))
