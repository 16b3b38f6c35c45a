"""What the model classes of transformers share: names of tensors, keys of config.json, and what none of them can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from kha_train.config.resolve import turned_dimensions
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.fields import REQUIRED, Field, Fixed, Number, Positive, Reading, Settings, Size, same, value_at
from kha_train.export.hosts.scaling import NotNegative, scaling_as_read, scaling_as_written
from kha_train.export.links import EXPERT_GATE_AND_UP, GATE_AND_UP, Layout, Link, Part, expert_down, one
from kha_train.foreign.documents import Json
from kha_train.variants.attention import POSITIONS

LayerLinks = Callable[[RunConfig, str, str], Iterator[Link]]
"""(configuration, prefix of ours, prefix of the host) -> the links of a part of a layer."""

NO_BASE = {
    "gta": "makes keys and values of one tied state",
    "talking_heads": "mixes scores across heads",
    "diff": "subtracts one map of attention from another",
    "linear": "has no softmax",
}
"""Why a base of ours has no host."""
NO_POSITIONS = {
    "alibi": "lowers scores with distance",
    "learned": "adds a vector for each position to the embedding",
    "none": "has no positions",
}

SILU = Fixed("hidden_act", "silu", "silu")
NO_BIAS = Fixed("attention_bias", False, False)
FIXED = (SILU, NO_BIAS, Fixed("quantization_config", None, None))
NO_WINDOW = Fixed("use_sliding_window", False, False)


def shape_fields(positions: int, eps: float) -> tuple[Field, ...]:
    """The keys that every class has; `positions` and `eps` are its defaults."""
    return (
        same("vocab_size", Size, "model.vocab_size"),
        same("hidden_size", Size, "model.hidden_size"),
        same("num_hidden_layers", Size, "model.layers"),
        same("num_attention_heads", Size, "model.query_heads", of="attention.base.query_heads"),
        same("max_position_embeddings", Size, "model.seq_len", positions),
        same("rms_norm_eps", Positive, "model.norm_eps", eps),
        same("tie_word_embeddings", bool, "model.tie_embeddings", False),
    )


def kv_heads(default: object = REQUIRED) -> Field:
    """The number of key/value heads of grouped-query attention."""
    return same("num_key_value_heads", Size, "model.kv_heads", default, of="attention.base.kv_heads")


def head_dim(default: object) -> Field:
    """The width of a head."""
    return same("head_dim", Size, "model.head_dim", default, of="attention.base.head_dim")


def narrow_heads(reading: Reading) -> int:
    """The width of heads that share the hidden size: what many classes assume without `head_dim`."""
    hidden, heads = (int(reading.take(key, Size)) for key in ("hidden_size", "num_attention_heads"))
    return hidden // heads


def rope(partial: float | None = None, scores: bool = False) -> Field:
    """Rotary positions. `partial` is the class's default share of a head that is rotated; None: it rotates all. In a
    class with `scores`, the entry `mscale_all_dim` also multiplies the scores, which our decoder does not compute.
    """

    def write(config: RunConfig) -> Json:
        written = scaling_as_written(config)
        return written if partial is None else {**written, "partial_rotary_factor": share(config)}

    def read(value: dict[str, Json] | None, reading: Reading) -> Settings:
        inner = Reading(value or {}, reading.source)
        if scores and (found := inner.take("mscale_all_dim", NotNegative, 0.0)):
            raise reading.source.fault("mscale_all_dim", "multiplies the scores of this class", found, "0")
        theta = inner.take("rope_theta", Positive, reading.take("rope_theta", Positive, 10_000.0))
        settings: Settings = {"model.rope_theta": float(theta), **scaling_as_read(inner, reading)}
        if partial is not None:
            outer = reading.take("partial_rotary_factor", Positive, partial)
            settings["model.partial_rotary_factor"] = float(inner.take("partial_rotary_factor", Positive, outer))
        return settings

    return Field("rope_parameters", dict[str, Any], write, read, None, also=("rope_scaling",))


def share(config: RunConfig) -> float:
    """The share of a head that is rotated, such that the host's whole part of width x share is our number."""
    width, turned = config.attention.base.rotary_width(), turned_dimensions(config)
    factor = turned / width
    return factor if int(width * factor) == turned else math.nextafter(factor, 1.0)


def of_experts(key: str, setting: str, all_dense: Callable[[Reading], bool], default: object = REQUIRED,
               also: tuple[str, ...] = ()) -> Field:  # fmt: skip
    """A number that only layers with experts have. A host that has none of them still wants one."""
    return Field(
        key,
        Number,
        lambda config: max(1, int(value_at(config, setting))),
        lambda value, reading: {setting: 0 if all_dense(reading) else value},
        default,
        also,
    )


def dense_width(has_dense: Callable[[Reading], bool], default: object = REQUIRED) -> Field:
    """The width of the feed-forward of dense layers. A host that has none of them still wants one."""
    return Field(
        "intermediate_size",
        Size,
        lambda config: config.moe.dense_width if config.moe.dense_layers else max(1, config.moe.expert_width),
        lambda value, reading: {"moe.dense_width": value if has_dense(reading) else 0},
        default,
    )


ALL_DENSE: Settings = {"moe.experts": 0, "moe.top_k": 0, "moe.expert_width": 0, "moe.shared_experts": 0}
"""The settings of a model without experts, besides the number and width of its dense layers."""


def all_layers_dense(value: int, reading: Reading) -> Settings:
    """The settings of a class of dense models, from the width of its feed-forward."""
    return {**ALL_DENSE, "moe.dense_layers": reading.take("num_hidden_layers", Size), "moe.dense_width": value}


def decoder_links(config: RunConfig, attention: LayerLinks, experts: LayerLinks) -> Iterator[Link]:
    """All tensors, layer by layer; `attention` and `experts` give those of their part."""
    yield one("embedding.weight", "model.embed_tokens.weight")
    for layer in range(config.model.layers):
        ours, host = f"blocks.{layer}", f"model.layers.{layer}"
        yield one(f"{ours}.attention_norm.weight", f"{host}.input_layernorm.weight")
        yield from attention(config, f"{ours}.attention", f"{host}.self_attn")
        yield one(f"{ours}.feed_forward_norm.weight", f"{host}.post_attention_layernorm.weight")
        if layer < config.moe.dense_layers:
            yield from swiglu_links(f"{ours}.feed_forward", f"{host}.mlp")
        else:
            yield from experts(config, f"{ours}.feed_forward", f"{host}.mlp")
    yield one("norm.weight", "model.norm.weight")
    if not config.model.tie_embeddings:
        yield one("head.weight", "lm_head.weight")


def grouped_query_links(config: RunConfig, ours: str, host: str) -> Iterator[Link]:
    """Queries, keys, values, output and, with `attention.qk_norm`, the norms."""
    for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        yield one(f"{ours}.{name}.weight", f"{host}.{projection}.weight")
    if config.attention.qk_norm != "none":
        yield one(f"{ours}.query_norm.weight", f"{host}.q_norm.weight")
        yield one(f"{ours}.key_norm.weight", f"{host}.k_norm.weight")


def swiglu_links(ours: str, host: str) -> Iterator[Link]:
    """A feed-forward, whose gate and up are one tensor of ours."""
    yield Link((Part(f"{ours}.gate_up.weight"),), _gate_and_up(host), GATE_AND_UP)
    yield one(f"{ours}.down.weight", f"{host}.down_proj.weight")


def expert_links(config: RunConfig, ours: str, host: str, scale: float = 1.0) -> Iterator[Link]:
    """The experts of a layer, one by one; `scale` is what the host multiplies into their last matrix."""
    down: Layout = expert_down(scale)
    for expert in range(config.moe.experts):
        there = f"{host}.experts.{expert}"
        yield Link((Part(f"{ours}.experts.gate_up", expert),), _gate_and_up(there), EXPERT_GATE_AND_UP)
        yield Link((Part(f"{ours}.experts.down", expert),), (f"{there}.down_proj.weight",), down)


def _gate_and_up(host: str) -> tuple[str, str]:
    return f"{host}.gate_proj.weight", f"{host}.up_proj.weight"


def refuses_attention(config: RunConfig, base: str, norms: tuple[str, ...], partial: bool) -> ConfigError | None:
    """Why a class with attention `base`, the QK-norms `norms` and rotation of all dimensions (or `partial`) does not
    compute the attention of `config`, or None.
    """
    attention = config.attention
    if attention.base.name != base:
        reason = NO_BASE.get(attention.base.name, f"is not {base}")
        return no_host("attention.base.name", attention.base.name, reason, "gqa, mla")
    if not POSITIONS[attention.positions].turns:
        return no_host("attention.positions", attention.positions, NO_POSITIONS[attention.positions], "rope")
    if attention.qk_norm not in norms:
        reason = "normalises all heads of a token at once" if attention.qk_norm == "full_width" else "another norm"
        return no_host("attention.qk_norm", attention.qk_norm, reason, ", ".join(norms))
    if not partial and turned_dimensions(config) != attention.base.rotary_width():
        factor = config.model.partial_rotary_factor
        return no_host("model.partial_rotary_factor", factor, "leaves a part of each head unturned", "1.0")
    return None


def refuses_groups(config: RunConfig) -> ConfigError | None:
    """Why a router that ranks groups by their two best experts does not route as that of `config`, or None."""
    moe = config.moe
    if moe.dense_layers < config.model.layers and moe.experts // moe.expert_groups < 2:
        return no_host("moe.experts", moe.experts, "the host ranks groups by two experts", "2 or more")
    return None


def no_host(field: str, value: Json, reason: str, allowed: str) -> ConfigError:
    """The error for a setting that no model class of transformers has."""
    return ConfigError(
        f"{reason}: no model class of transformers that we export to computes this",
        field=field,
        value=value,
        allowed=allowed,
        fix="`kha eval` and `kha generate` work on the run itself",
    )
