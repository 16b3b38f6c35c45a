"""Values that rooms agree on which do not import each other: they stand left of both, and need no torch."""

from __future__ import annotations

IGNORE_LABEL = -100
"""The label of a token that is not predicted: the data side writes it, the loss and the validation leave it out."""

FREE_TO_CHANGE = (
    "run.dir",
    "run.name",
    "run.init_from",
    "run.max_minutes",
    "resume.",
    "attention.name",
    "attention.backend",
    "attention.interaction.impl",
    "model.name",
    "model.loss_chunk_tokens",
    "moe.backend",
    "data.name",
    "data.train",
    "data.validation",
    "data.reader",
    "data.prefetch",
    "data.check_crc",
    "data.cache_dir",
    "data.cache_gib",
    "engine.zero_stage",
    "engine.micro_batch_size",
    "engine.device",
    "engine.kernels",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.reduce_bucket_elements",
    "engine.hpz_partition_size",
    "engine.collective_timeout_seconds",
    "engine.hang_timeout_seconds",
    "engine.audit_every",
    "checkpoint.",
    "profile.",
    "validation.",
    "stability.probe_every",
    "telemetry.",
    "cluster.",
)
"""Settings that may differ on resume: they change neither the model, nor the samples, nor the optimiser.

The paths of the data may change (those of `data.sources` too), its content may not: that is compared by content id.
"""
