"""What ranks that share rows (`engine.context_parallel`) exchange around attention, from the configuration alone."""

from __future__ import annotations

from typing import TypedDict

from kha_train.config.schema import RunConfig
from kha_train.estimate.memory import micro_batch_tokens, micro_batches, number_bytes
from kha_train.variants.attention import shared_key_repeats


class Exchanged(TypedDict):
    """Bytes that one rank sends in a step to the ranks that share its rows, and the seconds this takes on the slowest
    link it crosses (None: unknown). Nothing is computed meanwhile.
    """

    ranks: int
    bytes_per_step: int
    seconds_per_step: float | None


def exchanged(config: RunConfig) -> Exchanged:
    """Queries, keys, values and outputs of every layer travel in the forward, their gradients in the backward, and with
    recomputation the former once more. Of each, a rank keeps what is already in place: one part of S.
    """
    base, engine = config.attention.base, config.engine
    heads, ranks = base.heads(), engine.context_parallel
    keys = heads.kv_heads * shared_key_repeats(heads.query_heads, heads.kv_heads, ranks)
    numbers = (heads.query_heads + keys) * (base.kernel_width() + heads.value_width)
    passes = 2 if engine.activation_checkpointing == "none" else 3
    tokens = micro_batches(config) * micro_batch_tokens(config)
    width = number_bytes(config)
    sent = passes * config.model.layers * tokens * numbers * width * (ranks - 1) // ranks
    bandwidth = config.cluster.bandwidth_gb(ranks)
    return {"ranks": ranks, "bytes_per_step": sent, "seconds_per_step": sent / (bandwidth * 1e9) if bandwidth else None}
