"""Parameters and floating-point operations of a decoder, from its configuration alone: no torch, nothing is built.

Counts are exact and are tested against the real module. A multiplication and an addition are two operations; only
matrix products are counted. Causal attention is counted once: a token attends to half the row on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kha_train.config.options import BaseOptions, GroupedQueryOptions, InteractionOptions, KnockingOptions
from kha_train.config.schema import RunConfig

TRAINING_FACTOR = 3
"""A backward costs two forwards: one product for the gradient of each factor."""


@dataclass(frozen=True)
class ParameterCount:
    """`total` counts a tied matrix once; `active` counts top_k of the experts. `by_component` sums to `total`; its keys
    are embedding, attention, interaction, router, experts, norms, head (0 when tied)."""

    total: int
    active: int
    by_component: dict[str, int]


@dataclass(frozen=True)
class FlopCount:
    """Operations for one token of a row of `model.seq_len`.

    `forward` sums `by_component` (attention, scores, interaction, router, experts, head); `training` is 3 x forward.
    `mfu` is the numerator of MFU: 6 x active matrix parameters (attention projections, router, top_k experts, head) +
    6 S H K L for causal attention; nothing for an interaction, so that variants are compared by the work of the model
    they modify. `mfu_palm` counts attention without the causal half: 12 S H K L. Recomputation is in none of them.
    """

    forward: int
    training: int
    mfu: int
    mfu_palm: int
    by_component: dict[str, int]


@dataclass(frozen=True)
class AttentionCost:
    """One layer of an attention base: parameters of its projections and of its QK-norm, the numbers of heads an
    interaction meets and their widths by projection, and the width H * K that scores are computed over."""

    projections: int
    qk_norm: int
    heads: dict[str, int]
    widths: dict[str, int]
    score_width: int


def _grouped_query(config: RunConfig, base: BaseOptions) -> AttentionCost:
    assert isinstance(base, GroupedQueryOptions)
    head_dim, heads, groups = base.head_dim, base.query_heads, base.kv_heads
    qk_norm = {"per_head": 2 * head_dim, "full_width": (heads + groups) * head_dim, "none": 0}
    return AttentionCost(
        projections=2 * config.model.hidden_size * head_dim * (heads + groups),
        qk_norm=qk_norm[config.attention.qk_norm],
        heads={"q": heads, "k": groups, "v": groups},
        widths={"q": head_dim, "k": head_dim, "v": head_dim},
        score_width=heads * head_dim,
    )


def _no_matrices(options: InteractionOptions) -> dict[str, int]:
    return {}


def _knocking(matrices: int) -> Callable[[InteractionOptions], dict[str, int]]:
    def count(options: InteractionOptions) -> dict[str, int]:
        assert isinstance(options, KnockingOptions)
        return dict.fromkeys(options.projections, matrices)

    return count


BASE_COSTS: dict[str, Callable[[RunConfig, BaseOptions], AttentionCost]] = {"gqa": _grouped_query}
"""Registry name of a base -> the cost of one layer of it."""

INTERACTION_MATRICES: dict[str, Callable[[InteractionOptions], dict[str, int]]] = {
    "none": _no_matrices,
    "knocking_linear": _knocking(1),
    "knocking_mlp": _knocking(3),
}
"""Registry name of an interaction -> square matrices shared by the heads of each projection it acts on."""


def count_parameters(config: RunConfig) -> ParameterCount:
    """The parameters of the decoder of `config`. Selection biases and rotary tables are buffers and not counted."""
    model, moe = config.model, config.moe
    attention, matrices = _attention(config)
    by_component = {
        "embedding": model.vocab_size * model.hidden_size,
        "attention": model.layers * attention.projections,
        "interaction": model.layers * sum(n * attention.widths[p] ** 2 for p, n in matrices.items()),
        "router": model.layers * moe.experts * model.hidden_size,
        "experts": model.layers * moe.experts * _expert_parameters(config),
        "norms": model.layers * (2 * model.hidden_size + attention.qk_norm) + model.hidden_size,
        "head": 0 if model.tie_embeddings else model.vocab_size * model.hidden_size,
    }
    total = sum(by_component.values())
    idle = model.layers * (moe.experts - moe.top_k) * _expert_parameters(config)
    return ParameterCount(total, total - idle, by_component)


def flops_per_token(config: RunConfig) -> FlopCount:
    """The operations of the decoder of `config` for one token of a full row, counted as one document."""
    model, moe = config.model, config.moe
    attention, matrices = _attention(config)
    knocking = sum(n * attention.heads[p] * attention.widths[p] ** 2 for p, n in matrices.items())
    by_component = {
        "attention": 2 * model.layers * attention.projections,
        "scores": 2 * model.layers * model.seq_len * attention.score_width,
        "interaction": 2 * model.layers * knocking,
        "router": 2 * model.layers * moe.experts * model.hidden_size,
        "experts": 2 * model.layers * moe.top_k * _expert_parameters(config),
        "head": 2 * model.vocab_size * model.hidden_size,
    }
    forward = sum(by_component.values())
    mfu = TRAINING_FACTOR * (forward - by_component["interaction"])
    return FlopCount(
        forward=forward,
        training=TRAINING_FACTOR * forward,
        mfu=mfu,
        mfu_palm=mfu + TRAINING_FACTOR * by_component["scores"],
        by_component=by_component,
    )


def _attention(config: RunConfig) -> tuple[AttentionCost, dict[str, int]]:
    base, interaction = config.attention.base, config.attention.interaction
    return BASE_COSTS[base.name](config, base), INTERACTION_MATRICES[interaction.name](interaction)


def _expert_parameters(config: RunConfig) -> int:
    return 3 * config.model.hidden_size * config.moe.expert_width
