"""OLMoE: experts in every layer behind a softmax router, and a QK-norm over all heads of a token at once.

It has no width of heads of its own: they share the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.family import Family
from kha_train.export.fields import Field, Fixed, Reading, Settings, Size, same
from kha_train.export.hosts.common import (
    FIXED,
    decoder_links,
    grouped_query_links,
    kv_heads,
    narrow_heads,
    no_host,
    refuses_attention,
    rope,
    shape_fields,
)
from kha_train.export.hosts.qwen3 import refuses_softmax_router, softmax_experts
from kha_train.export.links import Link
from kha_train.foreign.documents import Json


def _heads(value: int, reading: Reading) -> Settings:
    """The number of heads, and with it their width."""
    return {"model.query_heads": value, "model.head_dim": narrow_heads(reading)}


def _refuses(config: RunConfig) -> ConfigError | None:
    model, base = config.model, config.attention.base
    if problem := refuses_attention(config, "gqa", ("full_width",), partial=False) or refuses_softmax_router(config):
        return problem
    if base.query_heads * base.head_dim != model.hidden_size:
        return no_host("model.head_dim", base.head_dim, "has heads that do not share the hidden size", "hidden / heads")
    if config.moe.dense_layers:
        return no_host("moe.dense_layers", config.moe.dense_layers, "has dense layers beside a norm of all heads", "0")
    return None


def _links(config: RunConfig, values: Mapping[str, Json]) -> Iterator[Link]:
    return decoder_links(config, grouped_query_links, softmax_experts)


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    {
        "attention": "gqa",
        "attention.positions": "rope",
        "attention.qk_norm": "full_width",
        "moe.score": "softmax",
        "moe.routed_scaling": 1.0,
        "moe.shared_experts": 0,
        "moe.dense_layers": 0,
        "moe.dense_width": 0,
    },
    (
        *(field for field in shape_fields(positions=4096, eps=1e-5) if field.key != "num_attention_heads"),
        Field("num_attention_heads", Size, lambda config: config.attention.base.query_heads, _heads),
        kv_heads(lambda reading: reading.take("num_attention_heads", Size)),
        rope(),
        Field(
            "intermediate_size",
            Size,
            lambda config: config.moe.expert_width,
            lambda value, _: {"moe.expert_width": value},
        ),
        same("num_experts", Size, "moe.experts", 64, also=("num_local_experts",)),
        same("num_experts_per_tok", Size, "moe.top_k", 8),
        same("norm_topk_prob", bool, "moe.renormalize", False),
    ),
    (*FIXED, Fixed("clip_qkv", None, None), Fixed("sliding_window", None, None)),
    _refuses,
    _links,
)
