"""A tiny run configuration, built directly from the dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kha_train.config.base_options import GroupedQueryOptions
from kha_train.config.interaction_options import KnockingLinearOptions as Linear
from kha_train.config.interaction_options import KnockingMlpOptions as Mlp
from kha_train.config.options import BaseOptions, InteractionOptions
from kha_train.config.schema import (
    AttentionSection,
    CheckpointSection,
    ClusterSection,
    DataSection,
    EngineSection,
    ModelSection,
    MoeSection,
    OptimSection,
    ResumeSection,
    RunConfig,
    RunSection,
    StabilitySection,
    TelemetrySection,
    ValidationSection,
)

INTERACTIONS: dict[str, InteractionOptions] = {
    "gqa": InteractionOptions(name="none"),
    "kha_linear": Linear(name="knocking_linear", impl="eager", projections=("q", "k", "v")),
    "kha_mlp": Mlp(name="knocking_mlp", impl="eager", projections=("v",)),
    "kha_mlp_qkv": Mlp(name="knocking_mlp", impl="eager", projections=("q", "k", "v")),
}

CLUSTER = ClusterSection(
    name="laptop",
    device="cpu",
    devices=1,
    devices_per_node=1,
    memory_gib=16.0,
    reserved_gib=1.0,
    peak_tflops=0.1,
    mfu=0.3,
    node_bandwidth_gb=1.0,
    network_bandwidth_gb=1.0,
    storage_bandwidth_gb=1.0,
    price_per_hour=0.0,
    hours_between_failures=50_000.0,
)

TINY = RunConfig(
    run=RunSection(dir="unused", name="tiny", steps=1, seed=7),
    model=ModelSection(
        name="tiny",
        layers=2,
        hidden_size=64,
        query_heads=4,
        kv_heads=2,
        head_dim=32,
        vocab_size=256,
        seq_len=64,
        loss_chunk_tokens=48,
    ),
    attention=AttentionSection(
        name="gqa",
        base=GroupedQueryOptions(name="gqa", query_heads=4, head_dim=32, kv_heads=2),
        interaction=INTERACTIONS["gqa"],
    ),
    moe=MoeSection(experts=8, top_k=2, expert_width=128),
    data=DataSection(name="none", train="", validation="", global_batch_size=2),
    optim=OptimSection(lr=1e-3),
    engine=EngineSection(zero_stage=1, micro_batch_size=2),
    checkpoint=CheckpointSection(every_steps=1),
    validation=ValidationSection(every_steps=0),
    stability=StabilitySection(),
    telemetry=TelemetrySection(),
    cluster=CLUSTER,
    resume=ResumeSection(),
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
