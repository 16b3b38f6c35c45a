"""Llama: dense layers, no QK-norm. Its own scaling of positions (`llama3`, from Llama 3.1 on) is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.family import Family
from kha_train.export.fields import Field, Fixed, Size
from kha_train.export.hosts.common import (
    FIXED,
    all_layers_dense,
    decoder_links,
    grouped_query_links,
    head_dim,
    kv_heads,
    narrow_heads,
    no_host,
    refuses_attention,
    rope,
    shape_fields,
)
from kha_train.export.hosts.glm4_moe import sigmoid_experts
from kha_train.export.links import Link
from kha_train.foreign.documents import Json


def _refuses(config: RunConfig) -> ConfigError | None:
    if config.moe.dense_layers < config.model.layers:
        return no_host("moe.experts", config.moe.experts, "a dense class has no experts", "0")
    return refuses_attention(config, "gqa", ("none",), partial=False)


def _links(config: RunConfig, values: Mapping[str, Json]) -> Iterator[Link]:
    return decoder_links(config, grouped_query_links, sigmoid_experts)


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    {"attention": "gqa", "attention.positions": "rope", "attention.qk_norm": "none"},
    (
        *shape_fields(positions=2048, eps=1e-6),
        kv_heads(lambda reading: reading.take("num_attention_heads", Size)),
        head_dim(narrow_heads),
        rope(),
        Field("intermediate_size", Size, lambda config: config.moe.dense_width, all_layers_dense),
    ),
    (*FIXED, Fixed("mlp_bias", False, False)),
    _refuses,
    _links,
)
