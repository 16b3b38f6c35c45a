"""The metrics that a run declared, for readers of its record.

A run writes the declarations in force to `run.json`. Runs of older releases did not; the frozen table `EARLIER`
describes their lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kha_train.metric import BY_LAYER, Metric

HEAD = (
    Metric("step", "steps", "finished optimiser steps, this one included (the first line says 1)"),
    Metric("attempt", "count", "which start of this run directory computed the step (the first is 1)", timing=True),
    Metric("time", "s", "seconds since 1970-01-01 UTC when the line was written", timing=True),
)
"""The fields that the record itself adds to every line."""
COUNTED = ("count", "row", "steps", "tokens", "0/1")
"""Units of counted numbers, which are always finite."""

_NAMES_BY_UNIT = {
    "steps": "step train/skipped_steps train/nonfinite_steps",
    "count": "attempt! checkpoint/failures! spike/events_total spike/narrow_total spike/wide_total "
    "spike/unrecovered_total",
    "row": "samples_first samples_last",
    "tokens": "tokens",
    "0/1": "train/grad_clipped train/skipped spike/open spike/z128_flag",
    "s": "time! train/step_seconds! data/wait_seconds! data/agreement_seconds! checkpoint/stall_seconds!",
    "tokens/s": "train/tokens_per_second!",
    "GiB": "memory/peak_gib!",
    "fraction": "train/mfu! data/padding moe/dead_fraction moe/dead_fraction_by_layer",
    "nats/token": "train/loss validation/loss",
    "bits/byte": "validation/bits_per_byte",
    "%": "spike/olmo_loss_score spike/olmo_loss_score_w10k spike/olmo_loss_up_score spike/olmo_gnorm_score "
    "spike/olmo_gnorm_score_w10k",
    "1": "train/grad_norm train/zclip_limit train/lr moe/maxvio_worst moe/auxiliary_loss moe/z_loss moe/maxvio "
    "moe/load_cv moe/load_entropy moe/bias_range moe/maxvio_by_layer moe/load_cv_by_layer moe/load_entropy_by_layer "
    "moe/bias_range_by_layer spike/z spike/z128_loss spike/z128_gnorm attn/max_logit kha/from_identity",
}
"""A "!" marks a number that depends on when and where a step ran."""

EARLIER: dict[str, Metric] = {
    name.rstrip("!"): Metric(
        name.rstrip("!"), unit, "", timing=name.endswith("!"), mirrored=not name.endswith(BY_LAYER)
    )
    for unit, names in _NAMES_BY_UNIT.items()
    for name in names.split()
}
"""The contents of lines before runs declared their metrics. Frozen: newer metrics are declared where they are
computed.
"""


def declared_in(run: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of the run whose `run.json` is `run`, by name, in the order declared. For a run that declared none,
    those of the table.
    """
    entries: Mapping[str, Any] = run.get("metrics", {})
    return {
        name: Metric(name, entry["unit"], entry["meaning"], entry["timing"], entry["mirrored"])
        for name, entry in entries.items()
    } or dict(EARLIER)


def timing_keys(run: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a run's lines that may differ between a resumed run and an uninterrupted one. Every other key is
    equal bit for bit.
    """
    return frozenset(name for name, metric in declared_in(run).items() if metric.timing)


def record_only(metrics: Iterable[Metric]) -> set[str]:
    """The names that mirrors leave out: those of `metrics`, and those in the lines of earlier attempts."""
    return {metric.name for metric in (*EARLIER.values(), *metrics) if not metric.mirrored}
