"""The named figures of a plan: a run's time, the size of its checkpoints, its use of the data."""

from __future__ import annotations

from typing import TypedDict


class PlannedBatch(TypedDict):
    """From `start_step` on, a step has `rows` rows."""

    start_step: int
    rows: int
    tokens_before: int


class RunTime(TypedDict):
    """A run's work, and its duration at the assumed MFU; None where the peak or the price is unknown. `tokens_per_step`
    and `step_seconds` are those of the largest step.
    """

    tokens: int
    tokens_per_step: int
    batch_schedule: list[PlannedBatch]
    total_flops: float
    mfu: float
    tokens_per_second: float | None
    step_seconds: float | None
    hours: float | None
    device_hours: float | None
    cost: float | None


class SavedSize(TypedDict):
    """A checkpoint's bytes, those of all that are kept (the ring's included), those of the copies in host memory of all
    ranks, and the save interval; None where the storage's speed or the step time is unknown."""

    bytes: int
    kept_bytes: int
    host_bytes: int
    write_seconds: float | None
    sensible_every_seconds: float | None
    sensible_every_steps: int | None
    every_steps: int


class DataUse(TypedDict):
    """The tokens of the training data, and how often the run reads them; None where the data are not here."""

    tokens: int | None
    epochs: float | None
