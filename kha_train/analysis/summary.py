"""The results of one run: each figure with its definition, and the table of facts that keeps a comparison honest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kha_train.analysis.history import DATA_ID, VALIDATION_ID, changes, history, shown, unrecorded
from kha_train.analysis.runs import UNTOLD, RunData
from kha_train.analysis.spikes import SpikeReport, recorded_curve, score_curve
from kha_train.config.constants import may_differ
from kha_train.stability.found import Found


@dataclass(frozen=True)
class Quantity:
    """One figure of a run: its name, how a number is printed (a boolean as `yes` or `no`), and its definition."""

    name: str
    style: str
    definition: str


RESULTS: dict[str, Quantity] = {
    "steps": Quantity("steps", ",.0f", "last optimiser step on the surviving curve"),
    "tokens": Quantity("tokens", ",.0f", "rows of the global batch x sequence length, summed over the steps"),
    "final_loss": Quantity(
        "train loss, end", ".4f", "mean train/loss over the last 10 % of the steps, nats per token; non-finite left out"
    ),
    "validation_loss": Quantity(
        "validation loss", ".4f", "last validation: cross-entropy in nats per token on held-out rows"
    ),
    "bits_per_byte": Quantity(
        "validation bits per byte", ".4f", "last validation: cross-entropy in bits / bytes of the text predicted"
    ),
    "tokens_per_second": Quantity("tokens per second", ",.0f", "median over the steps, all ranks together"),
    "step_seconds": Quantity("seconds per step", ".3g", "median over the steps, waiting for data included"),
    "mfu": Quantity("MFU", ".1%", "median of training FLOPs per token x tokens/s / peak FLOP/s of all ranks"),
    "peak_memory": Quantity("peak memory, GiB", ".2f", "peak of the run, rank 0: resident on a CPU, allocated on CUDA"),
    "parameters": Quantity("parameters", ",.0f", "all trained numbers, tied ones counted once"),
    "active_parameters": Quantity("active parameters", ",.0f", "parameters a token passes through"),
}

HONESTY: dict[str, Quantity] = {
    "attempts": Quantity("attempts", ",.0f", "starts of the run directory"),
    "lost": Quantity("lost attempts", ",.0f", "attempts whose end was not recorded: killed, crashed, or running"),
    "discarded": Quantity("discarded lines", ",.0f", "steps computed, then undone by a restart or a rewind"),
    "missing": Quantity("missing lines", ",.0f", "steps of this run without a line, up to the last one"),
    "skipped": Quantity("skipped steps", ",.0f", "steps whose update was not applied"),
    "nonfinite": Quantity("non-finite losses", ",.0f", "steps whose loss was nan or infinite"),
    "spikes": Quantity("loss spikes", ",.0f", "narrow and wide events, including those that a rewind undid"),
    "diverged": Quantity("diverged", "", "an event is open at the end, the divergence guard fired, or exit code 5"),
    "unrecovered": Quantity("unrecovered events", ",.0f", "rises of the loss that did not recover"),
    "open": Quantity("events open at the end", ",.0f", "rises of the loss that were still open at the last step"),
    "rewinds": Quantity("rewinds", ",.0f", "number of times the run went back and skipped data"),
    "zclip": Quantity("steps clipped by ZClip", ",.0f", "gradients it scaled down further than optim.grad_clip"),
}

TOLD: dict[str, Quantity] = {
    "world_size": Quantity("ranks", "", "processes that trained together"),
    "zero_stage": Quantity("ZeRO stage", "", "engine.zero_stage"),
    "data_content_id": Quantity("data", "", "content id of the training data"),
    "validation_content_id": Quantity("validation data", "", "content id of the validation set"),
    "changes": Quantity("changed during the run", "", "settings and facts, from one start to the next"),
    "parent": Quantity("branch of", "", "the checkpoint of another run that this one continues"),
    "unknown": Quantity("not recorded", "", "steps whose settings an older release did not record"),
}
"""Settings and facts of the attempts of a run, in words: the last rows of the honesty table."""
UNKNOWN_FIGURE = "-"
"""Printed where a run did not record a value."""


@dataclass(frozen=True)
class Summary:
    """The figures of one run, keyed as `RESULTS` and `HONESTY`; None where the run did not record them. `told` holds
    what `TOLD` names: a value, words where it changed during the run, or a list of words. `stability` has its loss
    events.
    """

    results: dict[str, float | None]
    honesty: dict[str, float | bool | None]
    told: dict[str, Any]
    end_state: str
    stability: SpikeReport


def printed(quantity: Quantity, value: object) -> str:
    """A quantity's value as it is printed everywhere; a dash when it is unknown."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value) or UNKNOWN_FIGURE
    return UNKNOWN_FIGURE if value is None else format(value, quantity.style)


def summarise(run: RunData, diverged: bool = False, found: Found | None = None) -> Summary:
    """The figures of one run. `diverged`: the run is about to end with exit code 5; `found`: what the monitor found in
    it; see `score_curve`.
    """
    tail = run.column("train/loss")[-max(1, len(run.columns) // 10) :]
    results = {
        "steps": float(run.steps[-1]),
        "tokens": _last(run.finite("tokens")),
        "final_loss": _mean(tail[np.isfinite(tail)]),
        "validation_loss": _last(run.finite("validation/loss")),
        "bits_per_byte": _last(run.finite("validation/bits_per_byte")),
        "tokens_per_second": _median(run.finite("train/tokens_per_second")),
        "step_seconds": _median(run.finite("train/step_seconds")),
        "mfu": _median(run.finite("train/mfu")),
        "peak_memory": _largest(run.finite("memory/peak_gib")),
        "parameters": run.fact("parameters.total") or run.fact("parameters"),
        "active_parameters": run.fact("parameters.active"),
    }
    attempts = run.run.get("attempts", [])
    stability = score_curve(recorded_curve(run.path, run.columns), diverged=diverged, found=found)
    honesty = {
        "attempts": float(len(attempts)) or None,
        "lost": float(sum(attempt["state"] in ("lost", "running") for attempt in attempts)),
        "discarded": float(run.discarded),
        "missing": float(run.steps[-1] - run.begun_after - len(run.columns)),
        "skipped": float(np.nansum(run.column("train/skipped"))),
        "nonfinite": float(np.sum(run.columns.has("train/loss") & ~np.isfinite(run.column("train/loss")))),
        "spikes": float(stability.summary["spikes"]) if stability.judged else None,
        "diverged": stability.summary["diverged"],
        "unrecovered": float(stability.summary["unrecovered_total"]),
        "open": float(stability.summary["open_total"]),
        "rewinds": float(stability.actions["rewind"]),
        "zclip": float(stability.actions["zclip"]),
    }
    return Summary(results, honesty, _told(run), attempts[-1]["state"] if attempts else "unknown", stability)


def _told(run: RunData) -> dict[str, Any]:
    """The values of `TOLD`."""
    return {
        "world_size": shown(history(run.stretches, "world_size")),
        "zero_stage": run.shown("engine.zero_stage"),
        "data_content_id": shown(history(run.stretches, DATA_ID)),
        "validation_content_id": shown(history(run.stretches, VALIDATION_ID)),
        "changes": [str(change) for change in changes(run.stretches) if not may_differ(change.key, UNTOLD)],
        "parent": run.run["parent"]["checkpoint"] if run.begun_after else None,
        "unknown": [f"settings {steps}" for steps in unrecorded(run.stretches, run.stretches)],
    }


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _largest(values: np.ndarray) -> float | None:
    return float(values.max()) if len(values) else None
