"""Qwen3: dense layers, QK-norm of each head. Qwen3-MoE: the same with experts behind a softmax router, which has no
selection bias and no scale: the bias must be zero, and the scale is multiplied into the experts' last matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.family import Family
from kha_train.export.fields import Field, Fixed, Reading, Settings, Size, same
from kha_train.export.hosts.common import (
    FIXED,
    NO_WINDOW,
    all_layers_dense,
    decoder_links,
    dense_width,
    expert_links,
    grouped_query_links,
    head_dim,
    kv_heads,
    narrow_heads,
    no_host,
    of_experts,
    refuses_attention,
    rope,
    shape_fields,
)
from kha_train.export.links import Link, Part, absent, one
from kha_train.foreign.documents import Json

_GIVEN = {"attention": "gqa", "attention.positions": "rope", "attention.qk_norm": "per_head"}


def _dense_first(value: list[int], reading: Reading) -> Settings:
    """The dense layers, which must be the first ones, as ours are."""
    layers = int(reading.take("num_hidden_layers", Size))
    dense = sorted(number for number in set(value) if number < layers)
    if dense != list(range(len(dense))):
        raise reading.source.fault("mlp_only_layers", "only the first layers can be dense", value)
    return {"moe.dense_layers": len(dense)}


def _dense(reading: Reading) -> int:
    """The number of dense layers."""
    count = _dense_first(reading.take("mlp_only_layers", list[int], []), reading)["moe.dense_layers"]
    return int(count)


def _all_dense(reading: Reading) -> bool:
    return _dense(reading) == int(reading.take("num_hidden_layers", Size))


def softmax_experts(config: RunConfig, ours: str, host: str) -> Iterator[Link]:
    """Router and experts. The classes with a softmax router have no selection bias, so it must be zero."""
    yield one(f"{ours}.router.weight", f"{host}.gate.weight")
    bias = Part(f"{ours}.router.selection_bias")
    yield Link((bias,), (), absent(config.moe.experts, "a class with a softmax router"), exact=True)
    yield from expert_links(config, ours, host, config.moe.routed_scaling)


def _refuses(config: RunConfig) -> ConfigError | None:
    return refuses_attention(config, "gqa", ("per_head",), partial=False)


def _refuses_dense(config: RunConfig) -> ConfigError | None:
    if config.moe.dense_layers < config.model.layers:
        return no_host("moe.experts", config.moe.experts, "a dense class has no experts", "0")
    return _refuses(config)


def _refuses_experts(config: RunConfig) -> ConfigError | None:
    return refuses_softmax_router(config) or _refuses(config)


def refuses_softmax_router(config: RunConfig) -> ConfigError | None:
    """Why the experts of `config` are not chosen by softmax scores alone, or None."""
    moe, softmax = config.moe, "beside a softmax router"
    if moe.score != "softmax":
        return no_host("moe.score", moe.score, "chooses experts by sigmoid scores", "softmax")
    if moe.shared_experts:
        return no_host("moe.shared_experts", moe.shared_experts, f"shared experts {softmax}", "0")
    if moe.expert_groups > 1:
        return no_host("moe.expert_groups", moe.expert_groups, f"groups of experts {softmax}", "1")
    return None


def _links(config: RunConfig, values: Mapping[str, Json]) -> Iterator[Link]:
    return decoder_links(config, grouped_query_links, softmax_experts)


DENSE = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _GIVEN,
    (
        *shape_fields(positions=32_768, eps=1e-6),
        kv_heads(lambda reading: reading.take("num_attention_heads", Size)),
        head_dim(128),
        rope(),
        Field("intermediate_size", Size, lambda config: config.moe.dense_width, all_layers_dense),
    ),
    (*FIXED, NO_WINDOW),
    _refuses_dense,
    _links,
)

EXPERTS = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {**_GIVEN, "moe.score": "softmax", "moe.routed_scaling": 1.0, "moe.shared_experts": 0},
    (
        *shape_fields(positions=32_768, eps=1e-6),
        kv_heads(4),
        head_dim(narrow_heads),
        rope(),
        of_experts("num_experts", "moe.experts", _all_dense, also=("num_local_experts",)),
        of_experts("num_experts_per_tok", "moe.top_k", _all_dense, 8),
        of_experts("moe_intermediate_size", "moe.expert_width", _all_dense),
        Field(
            "mlp_only_layers",
            list[int],
            lambda config: list(range(config.moe.dense_layers)),
            _dense_first,
            lambda _: [],
        ),
        dense_width(lambda reading: _dense(reading) > 0),
        same("norm_topk_prob", bool, "moe.renormalize", False),
    ),
    (*FIXED, NO_WINDOW, Fixed("decoder_sparse_step", 1, 1)),
    _refuses_experts,
    _links,
)
