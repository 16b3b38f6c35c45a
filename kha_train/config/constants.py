"""Values shared by rooms that do not import each other. They need no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

IGNORE_LABEL = -100
"""The label of a token that is not predicted: the data side writes it, loss and validation skip it."""

RING_COPIES, RING_KEPT = 2, 4
"""Of `checkpoint.ring_steps`: copies in host memory, and checkpoints that stay on disk, those of two events."""

ALIGNED_NUMBERS = 8
"""bf16 numbers in 16 bytes: what kernels read at once."""

GROUPS_IN_FLIGHT = 2
"""Parameter groups whose gradients are on their way to other ranks at a time: one that uses the link, and one that
follows. More would only take memory.
"""

PRECISION_OF: dict[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "bfloat16": "bf16"}
"""The `dtype` in a run's record -> the value of `engine.precision`, or of what `auto` selected."""

WITHOUT_EFFECT = (
    "run.dir",
    "run.name",
    "run.init_from",
    "run.branch_from",
    "run.max_minutes",
    "resume.",
    "attention.name",
    "model.name",
    "data.name",
    "data.train",
    "data.validation",
    "data.reader",
    "data.prefetch",
    "data.check_crc",
    "data.cache_dir",
    "data.cache_gib",
    "engine.collective_timeout_seconds",
    "engine.hang_timeout_seconds",
    "engine.audit_every",
    "checkpoint.",
    "profile.",
    "validation.",
    "evaluation.",
    "stability.probe_every",
    "telemetry.",
    "cluster.",
)
"""Settings, or sections (with a trailing dot), that change no number of a resumed training.

Only a run without a checkpoint reads `run.init_from` and `run.branch_from`. The paths of the data may change (those of
`data.sources` and `validation.sets` too), but not their content, which is compared by content id.
"""

ROUNDING = (
    "attention.backend",
    "attention.interaction.impl",
    "model.loss_chunk_tokens",
    "moe.backend",
    "engine.name",
    "engine.zero_stage",
    "engine.micro_batch_size",
    "engine.device",
    "engine.kernels",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.reduce_bucket_elements",
    "engine.hpz_partition_size",
    "engine.expert_parallel",
    "engine.context_parallel",
)
"""Settings that change the order of sums, or the kernel that computes them: only the last bits of a number change.

`engine.device` also decides what `engine.precision: auto` means: a resumed run must keep its precision.
"""

FREE_TO_CHANGE = (*WITHOUT_EFFECT, *ROUNDING)
"""Settings that may differ on resume: they change neither the model, nor the samples, nor the optimiser. `BOUND` has
priority.
"""

MAY_BRANCH = (
    # The schedule and the rate.
    "run.steps", "optim.lr", "optim.interaction_lr_scale", "optim.schedule.",
    # Clipping.
    "optim.grad_clip", "stability.zclip",
    # Precision.
    "engine.precision", "engine.grad_accum_dtype", "engine.moment_dtype",
    # The order of the data, its mixture and the size of a step.
    "data.global_batch_size", "data.batch_schedule", "data.seed", "data.shuffle", "data.packing", "data.sources",
    "data.phases", "data.skip_windows",
    # The router.
    "moe.top_k", "moe.score", "moe.router_precision", "moe.renormalize", "moe.routed_scaling", "moe.expert_groups",
    "moe.top_groups",
    "moe.bias_update", "moe.bias_update_rate", "moe.auxiliary_loss.", "moe.z_loss_weight",
    "moe.routing_warmup_steps", "moe.routing_seed",
    # The length of a row, and RoPE.
    "model.seq_len", "model.rope_theta", "model.partial_rotary_factor", "model.rope_scaling", "model.rope_factor",
    "model.rope_original_seq_len", "model.rope_beta_fast", "model.rope_beta_slow", "model.rope_attention_factor",
    # A branch has no checkpoints yet that a rewind may go back to.
    "checkpoint.",
)  # fmt: skip
"""Settings, or sections (with a dot at the end), in which a branch (`run.branch_from`) may differ from its parent,
beside those that are free to change on resume. An interaction may also be inserted or absorbed (`train/branch.py`)."""


def _counts_by_micro_batch(values: Mapping[str, Any]) -> bool:
    weight, scope = values.get("moe.auxiliary_loss.weight"), values.get("moe.auxiliary_loss.scope")
    return bool(weight) and scope == "micro_batch"


def _rewinds(values: Mapping[str, Any]) -> bool:
    return values.get("stability.policy") == "rewind"


BOUND: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    # The auxiliary loss of a micro-batch depends on the micro-batches. It does not depend on the number of ranks: rows
    # are assigned in order, so every split gives the same micro-batches.
    "engine.micro_batch_size": _counts_by_micro_batch,
    # A rewind goes back to one of the existing checkpoints.
    "checkpoint.every_steps": _rewinds,
    "checkpoint.every_minutes": _rewinds,
    "checkpoint.keep_last": _rewinds,
    "checkpoint.keep_every_steps": _rewinds,
}
"""Settings that are free only under a condition, each with a function that tells, from a configuration by dotted keys,
whether the setting then changes results.
"""


def may_differ(key: str, allowed: Iterable[str], *configurations: Mapping[str, Any]) -> bool:
    """Whether the setting `key` is one of `allowed` (or lies in one of its sections), and is bound in none of
    `configurations` (values by dotted keys).
    """
    listed = any(key == name or (name.endswith(".") and key.startswith(name)) for name in allowed)
    return listed and not (key in BOUND and any(BOUND[key](values) for values in configurations))
