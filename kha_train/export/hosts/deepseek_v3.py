"""DeepSeek-V3: latent attention, and the router of GLM-4-MoE.

Its rotary dimensions are written in pairs, as the published models have them (`rope_interleave`): servers such as vLLM
read no other layout. Its latents are normalised with an eps of 1e-6, whatever `rms_norm_eps` says. `topk_method` and
`scoring_func` are not read by transformers, but by servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.family import Family
from kha_train.export.fields import Field, Fixed, Positive, Reading, Settings, Size, same
from kha_train.export.hosts.common import (
    FIXED,
    decoder_links,
    no_host,
    refuses_attention,
    rope,
    shape_fields,
)
from kha_train.export.hosts.glm4_moe import refuses_router, sigmoid_experts, sigmoid_router
from kha_train.export.links import Link, Part, heads_of, one, stacked
from kha_train.foreign.documents import Json
from kha_train.variants.bases import LatentOptions

LATENT_EPS = 1e-6
"""The eps of the norms of its latents, which no setting changes."""


def _base(config: RunConfig) -> LatentOptions:
    assert isinstance(config.attention.base, LatentOptions)
    return config.attention.base


def _equal(key: str, to: str, default: int, write: Callable[[RunConfig], int]) -> Field:
    """A width that our attention has only once: it must be that at the key `to`."""

    def read(value: int, reading: Reading) -> Settings:
        other = reading.take(to, Size)
        if value != other:
            raise reading.source.fault(key, f"differs from {to}", value, str(other))
        return {}

    return Field(key, Size, write, read, default)


def _eps(value: float, reading: Reading) -> Settings:
    if value != LATENT_EPS:
        raise reading.source.fault("rms_norm_eps", "its latents are normalised with another", value, str(LATENT_EPS))
    return {"model.norm_eps": value}


def _query_latent(value: int, reading: Reading) -> Settings:
    """Null says that queries have no latent; only a missing key means the class's default."""
    null = "q_lora_rank" in reading.values and reading.values["q_lora_rank"] is None
    return {"attention.base.query_latent_width": 0 if null else value}


def _attention(config: RunConfig, ours: str, host: str, paired: bool) -> Iterator[Link]:
    base = _base(config)
    queries = "q_proj"
    if base.query_latent_width:
        queries = "q_b_proj"
        yield one(f"{ours}.query_down.0.weight", f"{host}.q_a_proj.weight")
        yield one(f"{ours}.query_down.1.weight", f"{host}.q_a_layernorm.weight")
    parts = Part(f"{ours}.query.weight"), Part(f"{ours}.rotary_query.weight")
    yield Link(parts, (f"{host}.{queries}.weight",), heads_of(base.query_heads, base.head_dim, paired))
    down = Part(f"{ours}.latent.weight"), Part(f"{ours}.rotary_key.weight")
    yield Link(down, (f"{host}.kv_a_proj_with_mqa.weight",), stacked(base.latent_width, int(paired)))
    yield one(f"{ours}.latent_norm.weight", f"{host}.kv_a_layernorm.weight")
    up = Part(f"{ours}.key_up.weight"), Part(f"{ours}.value_up.weight")
    yield Link(up, (f"{host}.kv_b_proj.weight",), heads_of(base.query_heads, base.head_dim))
    yield one(f"{ours}.output.weight", f"{host}.o_proj.weight")


def _refuses(config: RunConfig) -> ConfigError | None:
    if problem := refuses_attention(config, "mla", ("none",), partial=False):
        return problem
    if config.model.norm_eps != LATENT_EPS:
        reason = "DeepSeek-V3 normalises its latents with an eps of its own"
        return no_host("model.norm_eps", config.model.norm_eps, reason, str(LATENT_EPS))
    return refuses_router(config)


def _links(config: RunConfig, values: Mapping[str, Json]) -> Iterator[Link]:
    paired = values.get("rope_interleave", True) is not False

    def attention(config: RunConfig, ours: str, host: str) -> Iterator[Link]:
        return _attention(config, ours, host, paired)

    return decoder_links(config, attention, sigmoid_experts)


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {"attention": "mla", "attention.positions": "rope", "attention.qk_norm": "none", "moe.score": "sigmoid"},
    (
        *(field for field in shape_fields(positions=4096, eps=1e-6) if field.key != "rms_norm_eps"),
        Field("rms_norm_eps", Positive, lambda config: config.model.norm_eps, _eps, 1e-6),
        _equal("num_key_value_heads", "num_attention_heads", 128, lambda config: _base(config).query_heads),
        same("kv_lora_rank", Size, "attention.base.latent_width", 512),
        same("qk_rope_head_dim", Size, "attention.base.rotary_dim", 64),
        same("qk_nope_head_dim", Size, "model.head_dim", 128, of="attention.base.head_dim"),
        _equal("v_head_dim", "qk_nope_head_dim", 128, lambda config: _base(config).head_dim),
        Field("q_lora_rank", Size, lambda config: _base(config).query_latent_width or None, _query_latent, 1536),
        rope(scores=True),
        Field("rope_interleave", bool, lambda config: True, lambda value, _: {}, True),
        *sigmoid_router(groups=8, top_groups=4, dense=3, scaling=2.5),
    ),
    (
        *FIXED,
        Fixed("num_nextn_predict_layers", 0, 1, harmless=(1,)),
        Fixed("topk_method", "noaux_tc", "noaux_tc"),
        Fixed("scoring_func", "sigmoid", "sigmoid"),
        Fixed("moe_layer_freq", 1, 1),
    ),
    _refuses,
    _links,
)
