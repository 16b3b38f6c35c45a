"""GLM-4-MoE: sigmoid router with a selection bias, optional QK-norm of each head, shared experts, dense layers first.

Traps of its defaults, all written: half of every head is rotated, heads are as wide as the hidden size allows, one
shared expert, one dense layer, no QK-norm. Without shared experts it still wants their tensors, without elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.family import Family
from kha_train.export.fields import Field, Fixed, Number, Positive, Reading, Size, same
from kha_train.export.hosts.common import (
    FIXED,
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
    refuses_groups,
    rope,
    shape_fields,
    swiglu_links,
)
from kha_train.export.links import Link, empty, one
from kha_train.foreign.documents import Json


def has_dense(reading: Reading) -> bool:
    """Whether the first layers are dense."""
    return bool(_dense(reading))


def all_dense(reading: Reading) -> bool:
    """Whether no layer has experts."""
    return _dense(reading) >= int(reading.take("num_hidden_layers", Size))


def _dense(reading: Reading) -> int:
    return int(reading.take("first_k_dense_replace", Number, 1))


def sigmoid_router(groups: int = 1, top_groups: int = 1, dense: int = 1, scaling: float = 1.0) -> tuple[Field, ...]:
    """The keys of mixtures whose router ranks sigmoid scores; the arguments are the class's defaults."""
    return (
        of_experts("n_routed_experts", "moe.experts", all_dense, also=("num_local_experts",)),
        of_experts("num_experts_per_tok", "moe.top_k", all_dense, 8),
        of_experts("moe_intermediate_size", "moe.expert_width", all_dense),
        Field(
            "n_shared_experts",
            Number,
            lambda config: config.moe.shared_experts,
            lambda value, reading: {"moe.shared_experts": 0 if all_dense(reading) else value},
            1,
        ),
        Field(
            "first_k_dense_replace",
            Number,
            lambda config: config.moe.dense_layers,
            lambda value, reading: {"moe.dense_layers": min(value, reading.take("num_hidden_layers", Size))},
            dense,
        ),
        dense_width(has_dense),
        same("norm_topk_prob", bool, "moe.renormalize", True),
        same("routed_scaling_factor", Positive, "moe.routed_scaling", scaling),
        same("n_group", Size, "moe.expert_groups", groups),
        same("topk_group", Size, "moe.top_groups", top_groups),
    )


def sigmoid_experts(config: RunConfig, ours: str, host: str) -> Iterator[Link]:
    """Router, selection bias, experts, shared experts."""
    yield one(f"{ours}.router.weight", f"{host}.gate.weight")
    yield one(f"{ours}.router.selection_bias", f"{host}.gate.e_score_correction_bias")._replace(exact=True)
    yield from expert_links(config, ours, host)
    if config.moe.shared_experts:
        yield from swiglu_links(f"{ours}.shared", f"{host}.shared_experts")
        return
    names = tuple(f"{host}.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))
    width = config.model.hidden_size
    yield Link((), names, empty((0, width), (0, width), (width, 0)))


def refuses_router(config: RunConfig) -> ConfigError | None:
    """Why the experts of `config` are not chosen by sigmoid scores, or None."""
    if config.moe.dense_layers < config.model.layers and config.moe.score != "sigmoid":
        reason = "a softmax router beside shared experts, groups or latent attention"
        return no_host("moe.score", config.moe.score, reason, "sigmoid")
    return refuses_groups(config)


def _refuses(config: RunConfig) -> ConfigError | None:
    return refuses_attention(config, "gqa", ("per_head", "none"), partial=True) or refuses_router(config)


def _links(config: RunConfig, values: Mapping[str, Json]) -> Iterator[Link]:
    return decoder_links(config, grouped_query_links, sigmoid_experts)


FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    {"attention": "gqa", "attention.positions": "rope", "moe.score": "sigmoid"},
    (
        *shape_fields(positions=131_072, eps=1e-5),
        kv_heads(8),
        head_dim(narrow_heads),
        rope(partial=0.5),
        Field(
            "use_qk_norm",
            bool,
            lambda config: config.attention.qk_norm == "per_head",
            lambda value, _: {"attention.qk_norm": "per_head" if value else "none"},
            False,
        ),
        *sigmoid_router(),
    ),
    (*FIXED, Fixed("num_nextn_predict_layers", 0, 1, harmless=(1,))),
    _refuses,
    _links,
)
