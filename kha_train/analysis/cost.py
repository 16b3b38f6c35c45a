"""What a run cost: parameters, operations, time, memory, and the cache that its model needs for generation."""

# N steps with a known duration

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kha_train.analysis.runs import RunData
from kha_train.analysis.summary import RESULTS, Quantity, Summary
from kha_train.config.compose import load
from kha_train.config.schema import RunConfig
from kha_train.errors import KhaError
from kha_train.estimate.counts import cache_bytes_per_token, flops_per_token
from kha_train.record.attempts import CONFIG_FILE

COSTS: dict[str, Quantity] = {
    "parameters": RESULTS["parameters"],
    "active_parameters": RESULTS["active_parameters"],
    "flops_per_token": Quantity(
        "training FLOPs per token", ",.0f", "3 x the matrix products of a forward pass, head interactions included"
    ),
    "total_flops": Quantity("training FLOPs", ".4g", "FLOPs per token x tokens on the surviving curve"),
    "step_seconds": RESULTS["step_seconds"],
    "step_p95": Quantity("seconds per step, p95", ".4g", "95 % of the steps took at most this long"),
    "hours": Quantity("hours of steps", ".3g", "sum of the seconds of all steps on the surviving curve"),
    "tokens_per_second": RESULTS["tokens_per_second"],
    "peak_memory": RESULTS["peak_memory"],
    "cache_bytes": Quantity(
        "cache per token, bytes", ",.0f", "keys and values of one token of context in all layers, two bytes a number"
    ),
}


@dataclass(frozen=True)
class Cost:
    """The figures of one run, keyed as `COSTS`; None where the record does not give them. Figures from the
    configuration are those of the last attempt.
    """

    figures: dict[str, float | None]

    @property
    def flops_per_token(self) -> float | None:
        """Training FLOPs per token, from the configuration."""
        return self.figures["flops_per_token"]


def cost_of(run: RunData, summary: Summary) -> Cost:
    """The cost of `run`, whose figures are `summary`."""
    config = _config(run.path)
    flops = float(flops_per_token(config).training) if config else None
    tokens, seconds_N = summary.results["tokens"], run.finite("train/step_seconds")
    figures: dict[str, float | None] = {
        "parameters": summary.results["parameters"],
        "active_parameters": summary.results["active_parameters"],
        "flops_per_token": flops,
        "total_flops": flops * tokens if flops and tokens else None,
        "step_seconds": summary.results["step_seconds"],
        "step_p95": _quantile(seconds_N, 0.95),
        "hours": float(seconds_N.sum()) / 3600 if len(seconds_N) else None,
        "tokens_per_second": summary.results["tokens_per_second"],
        "peak_memory": summary.results["peak_memory"],
        "cache_bytes": float(cache_bytes_per_token(config)) if config else None,
    }
    return Cost(figures)


def _quantile(values: np.ndarray, share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


def _config(run_dir: Path) -> RunConfig | None:
    """The configuration of the last attempt; None where this release cannot build it."""
    try:
        return load(run_dir / CONFIG_FILE)
    except (KhaError, OSError):
        return None
