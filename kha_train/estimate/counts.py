"""Parameters and floating-point operations of a decoder, from its configuration alone: no torch, nothing is built.

Counts are exact and are tested against the real module. A multiplication and an addition are two operations; only
matrix products are counted. Causal attention is counted once: a token attends to half the row on average. The options
of base and interaction give the parameters and operations of an attention layer (`variants/attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kha_train.config.schema import RunConfig
from kha_train.variants.attention import POSITIONS, component_parameters

TRAINING_FACTOR = 3
"""A backward costs two forwards: one product for the gradient of each factor."""


@dataclass(frozen=True)
class ParameterCount:
    """`total` counts a tied matrix once; `active` counts top_k of the routed experts. `by_component` sums to `total`:
    embedding, attention, interaction, router, experts, shared_experts, dense (the dense feed-forwards), norms, head (0
    when tied). `frozen` are numbers of an interaction that is not trained: no parameters, and not in `total`.
    """

    total: int
    active: int
    by_component: dict[str, int]
    frozen: int = 0


@dataclass(frozen=True)
class FlopCount:
    """Operations per token of a row of `model.seq_len`.

    `forward` sums `by_component` (attention, scores, interaction, router, experts, shared_experts, dense, head);
    `training` is 3 x forward, 2 x for matrices that are not trained. `mfu` is the numerator of MFU: 6 x active matrix
    parameters (all of those components) + 6 S H K L for causal attention. It counts nothing for an interaction, so that
    variants are compared by the work of the model they modify. `mfu_palm` counts attention without the causal half: 12
    S H K L. None counts recomputation.
    """

    forward: int
    training: int
    mfu: int
    mfu_palm: int
    by_component: dict[str, int]


def count_parameters(config: RunConfig) -> ParameterCount:
    """The parameters of the decoder of `config`. Selection biases and rotary tables are buffers and not counted."""
    model, moe, attention = config.model, config.moe, config.attention
    base = attention.base
    by_component = {
        "embedding": (model.vocab_size + _learned_positions(config)) * model.hidden_size,
        "attention": sum(attention_parameters(config)),
        "interaction": sum(interaction.parameters(base.heads()) for interaction in config.interactions),
        "router": moe_layers(config) * moe.experts * model.hidden_size,
        "experts": moe_layers(config) * moe.experts * _expert_parameters(config),
        "shared_experts": moe_layers(config) * moe.shared_experts * _expert_parameters(config),
        "dense": moe.dense_layers * 3 * model.hidden_size * moe.dense_width,
        "norms": model.layers * (2 * model.hidden_size + base.norm_parameters(attention.qk_norm)) + model.hidden_size,
        "head": 0 if model.tie_embeddings else model.vocab_size * model.hidden_size,
    }
    total = sum(by_component.values())
    idle = moe_layers(config) * (moe.experts - moe.top_k) * _expert_parameters(config)
    frozen = sum(interaction.frozen_numbers(base.heads()) for interaction in config.interactions)
    return ParameterCount(total, total - idle, by_component, frozen)


def held_parameters(config: RunConfig) -> tuple[int, int]:
    """The parameters that every rank holds whole under ZeRO 1 and 2, and its part of the experts that ranks share
    (`engine.expert_parallel`; 0 when every rank holds all of them).
    """
    total, shared = count_parameters(config).total, config.engine.expert_parallel
    if shared == 1:
        return total, 0
    experts = moe_layers(config) * config.moe.experts * _expert_parameters(config)
    return total - experts, experts // shared


def flops_per_token(config: RunConfig) -> FlopCount:
    """Operations per token of the decoder of `config`, for a full row that is one document."""
    model, moe = config.model, config.moe
    base = config.attention.base
    by_component = {
        "attention": model.layers * base.token_flops(model.hidden_size) + 2 * _component_parameters(config),
        "scores": model.layers * base.score_flops(model.seq_len),
        "interaction": sum(interaction.flops(base.heads()) for interaction in config.interactions),
        "router": 2 * moe_layers(config) * moe.experts * model.hidden_size,
        "experts": 2 * moe_layers(config) * moe.top_k * _expert_parameters(config),
        "shared_experts": 2 * moe_layers(config) * moe.shared_experts * _expert_parameters(config),
        "dense": 2 * moe.dense_layers * 3 * model.hidden_size * moe.dense_width,
        "head": 2 * model.vocab_size * model.hidden_size,
    }
    forward = sum(by_component.values())
    frozen = any(interaction.frozen_numbers(base.heads()) for interaction in config.interactions)
    mfu = TRAINING_FACTOR * (forward - by_component["interaction"])
    return FlopCount(
        forward=forward,
        training=TRAINING_FACTOR * forward - (by_component["interaction"] if frozen else 0),
        mfu=mfu,
        mfu_palm=mfu + TRAINING_FACTOR * by_component["scores"],
        by_component=by_component,
    )


@dataclass(frozen=True)
class InteractionOverhead:
    """What the head interaction adds to the model without it, in percent. `cache` refers to the decoding cache per
    token.
    """

    parameters: float
    flops: float
    cache: float


def interaction_overhead(config: RunConfig) -> InteractionOverhead:
    """The interaction's share of parameters and operations, in percent (unfolded, so independent of the
    implementation).
    """
    parameters, flops = count_parameters(config), flops_per_token(config)
    projected = _component_parameters(config)
    extra = parameters.by_component["interaction"] + projected
    extra_flops = flops.by_component["interaction"] + 2 * projected
    return InteractionOverhead(
        parameters=100 * extra / (parameters.total - extra),
        flops=100 * extra_flops / (flops.forward - extra_flops),
        cache=100 * _interaction_cache(config) / max(1, config.model.layers * config.attention.base.cache_numbers()),
    )


def cache_bytes_per_token(config: RunConfig, bytes_per_number: int = 2) -> int:
    """Bytes per token of context in the key/value caches of all layers while generating."""
    numbers = config.model.layers * config.attention.base.cache_numbers() + _interaction_cache(config)
    return numbers * bytes_per_number


def cache_bytes_per_row(config: RunConfig, bytes_per_number: int = 2) -> int:
    """Bytes that all layers keep of a row while generating, whatever its length, besides those of its tokens."""
    return config.model.layers * config.attention.base.row_numbers() * bytes_per_number


def _interaction_cache(config: RunConfig) -> int:
    """Numbers per token of all layers."""
    return sum(interaction.cache_numbers(config.attention.heads()) for interaction in config.interactions)


def attention_parameters(config: RunConfig) -> list[int]:
    """Parameters of the projections of each layer, without norms and interaction."""
    base, width = config.attention.base, config.model.hidden_size
    return [base.parameters(width) + component_parameters(base, one, width) for one in config.interactions]


def _component_parameters(config: RunConfig) -> int:
    base, width = config.attention.base, config.model.hidden_size
    return sum(component_parameters(base, interaction, width) for interaction in config.interactions)


def map_parameters(config: RunConfig) -> int:
    """The parameters that are linear maps of features inside layers (`LinearMap`). In attention, these are what costs
    a multiplication and an addition for each token.
    """
    parts = count_parameters(config).by_component
    attention = flops_per_token(config).by_component["attention"] // 2
    return attention + parts["experts"] + parts["shared_experts"] + parts["dense"]


def moe_layers(config: RunConfig) -> int:
    """Number of layers with experts."""
    return config.model.layers - config.moe.dense_layers


def _learned_positions(config: RunConfig) -> int:
    return config.model.seq_len if POSITIONS[config.attention.positions].embedding else 0


def _expert_parameters(config: RunConfig) -> int:
    return 3 * config.model.hidden_size * config.moe.expert_width
