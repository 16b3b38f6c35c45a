"""Warns before a run with very long steps, from the configuration alone."""

from __future__ import annotations

from kha_train.config.schema import RunConfig
from kha_train.telemetry.format import duration

LONG_STEP_SECONDS = 120.0
"""Longer steps get a warning."""
MANY_MICRO_BATCHES = 1_000
"""Steps with this many micro-batches get a warning even before their duration is known."""


def long_step_warning(config: RunConfig, rows_of_a_rank: int, seconds: float | None = None) -> str:
    """A warning before a run if its steps have very many micro-batches, or are expected to take very long (`seconds`);
    else "".
    """
    micro_batches = -(-rows_of_a_rank // config.engine.micro_batch_size)
    if seconds is not None and seconds > LONG_STEP_SECONDS:
        return f"a step is expected to take {duration(seconds)}: {many_micro_batches(config, micro_batches)}"
    return f"a step is {many_micro_batches(config, micro_batches)}" if micro_batches >= MANY_MICRO_BATCHES else ""


def many_micro_batches(config: RunConfig, micro_batches: int) -> str:
    """What a step with this many micro-batches means for recording and stopping, and what to change."""
    return (
        f"{micro_batches:,} micro-batches of {config.engine.micro_batch_size} rows on every rank. Nothing is recorded "
        "or saved before a step ends, and a stop discards it; lower data.global_batch_size "
        f"({config.data.batch_sizes.largest:,}), raise engine.micro_batch_size or use more ranks"
    )
