"""A tiny run configuration, and variants of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.variants.attention import BaseOptions, InteractionOptions
from kha_train.variants.bases import GroupedQueryOptions
from kha_train.variants.explicit import ExplicitOptions
from kha_train.variants.interactions import KnockingGateOptions as Gate
from kha_train.variants.interactions import KnockingLinearOptions as Linear
from kha_train.variants.interactions import KnockingMlpOptions as Mlp

INTERACTIONS: dict[str, InteractionOptions] = {
    "gqa": InteractionOptions(name="none"),
    "kha_linear": Linear(name="knocking_linear", impl="eager", projections=("q", "k", "v")),
    "kha_mlp": Mlp(name="knocking_mlp", impl="eager", projections=("v",)),
    "kha_mlp_qkv": Mlp(name="knocking_mlp", impl="eager", projections=("q", "k", "v")),
    "linear_a_head": Linear(name="knocking_linear", impl="eager", projections=("q", "k", "v"), share="none"),
    "mlp_a_head": Mlp(name="knocking_mlp", impl="eager", projections=("q", "k", "v"), share="none"),
    "kha_gate": Gate(name="knocking_gate", projections=("v",)),
    "mea": ExplicitOptions(name="explicit", impl="eager"),
}

TINY = compose(
    [
        "run.seed=7",
        "model=tiny",
        "model.layers=2",
        "model.hidden_size=64",
        "model.vocab_size=256",
        "model.seq_len=64",
        "model.loss_chunk_tokens=48",
        "data.global_batch_size=2",
        "engine.micro_batch_size=2",
    ]
)


def tiny_config(variant: str = "gqa", **sections: dict[str, Any]) -> RunConfig:
    """The tiny configuration with an attention variant, and fields of sections replaced: `moe={"backend": "loop"}`."""
    config = replace(TINY, attention=replace(TINY.attention, name=variant, interaction=INTERACTIONS[variant]))
    for name, fields in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **fields)})
    return config


def moe_6b_config(variant: str = "gqa") -> RunConfig:
    """The shape of the paper's 6.1B / 1.01B-active model."""
    base: BaseOptions = GroupedQueryOptions(name="gqa", query_heads=32, head_dim=128, kv_heads=4)
    return tiny_config(
        variant,
        model={
            "layers": 18,
            "hidden_size": 2048,
            "query_heads": 32,
            "kv_heads": 4,
            "head_dim": 128,
            "vocab_size": 157_184,
            "seq_len": 8192,
        },
        attention={"base": base},
        moe={"experts": 128, "top_k": 8, "expert_width": 384},
    )


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """`tiny_config`, for tests that ask for it by name."""
    return tiny_config


@pytest.fixture
def make_6b_config() -> Callable[..., RunConfig]:
    """`moe_6b_config`, for tests that ask for it by name."""
    return moe_6b_config
