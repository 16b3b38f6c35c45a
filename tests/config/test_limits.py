"""Every number has a declared range, and text contains nothing that a file name or a program rejects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from kha_train import compose
from kha_train.config.build import to_plain
from kha_train.config.limits import INT64, LARGEST_FP32, LIMITS, OF_TYPE, check_limits, limit_of
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.variants.attention import BaseOptions, InteractionOptions
from kha_train.variants.optimizer import OptimSection
from kha_train.variants.registry import BASES, INTERACTIONS, OPTIMIZERS, Variant

FREE = {
    "model.partial_rotary_factor": "judged with what each base turns",
    "optim.betas": "each a share below 1",
    "optim.momentum": "a share below 1",
    "optim.schedule.warmup": "a share",
    "optim.schedule.decay": "a share",
    "optim.schedule.final": "a share",
    "moe.routed_scaling": "any number but 0",
    "data.sources.weight": "judged by the mixture",
    "data.phases.weights": "judged by the mixture",
}
"""Numbers whose range is not a single interval."""
BY_NAME: dict[type, Mapping[str, Variant[Any]]] = {
    OptimSection: OPTIMIZERS,
    BaseOptions: BASES,
    InteractionOptions: INTERACTIONS,
}
"""Sections whose fields depend on a registered name."""


def _numbers(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    for field in fields(cls):
        hint, where = get_type_hints(cls)[field.name], f"{path}.{field.name}".lstrip(".")
        inner = hint
        while get_origin(inner) in (tuple, UnionType):
            inner = get_args(inner)[0]
        if inner in BY_NAME:
            yield from (number for one in BY_NAME[inner].values() for number in _numbers(one.options_class(), where))
        elif is_dataclass(inner):
            yield from _numbers(inner, where)
        elif inner in (int, float):
            yield where, inner


def test_every_number_of_the_schema_has_a_declared_range_or_a_reason() -> None:
    undeclared = {path for path, kind in _numbers(RunConfig) if limit_of(path, kind) == OF_TYPE[kind]}
    assert undeclared <= FREE.keys()
    known = {path for path, _ in _numbers(RunConfig)}
    assert {key for key in LIMITS if not key.endswith("*")} <= known, "no range of a number that is gone"


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("run.steps=0", "at least 1"),
        ("run.seed=-1", "0 or more"),
        (f"run.seed={2**63}", f"at most {2**63 - 1:,}"),
        ("optim.lr=0", "above 0"),
        ("optim.lr=1e39", "at most 3.40282e+38"),
        ("data.global_batch_size=4000000000000000000000000000000", "at most 2,147,483,647"),
        ("engine.collective_timeout_seconds=1e300", "at most 1e+09"),
        ("engine.hang_timeout_seconds=1e10", "at most 1e+09"),
        (f"validation.rows={2**63}", f"at most {2**63 - 1:,}"),
        ("attention.base.query_heads=100000000000", "at most 1,048,576"),
        ("cluster.mfu=-0.1", "0 or more"),
        ("data.prefetch=1000000000000", "at most 10,000"),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_is_allowed(override: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([override])
    assert refused.value.allowed == allowed and refused.value.field == override.partition("=")[0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", ["optim.betas", "optim.lr", "cluster.mfu", "attention.interaction.init.scale"])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(field: str, value: str) -> None:
    text = f"[0.9,{value}]" if field == "optim.betas" else value
    with pytest.raises(ConfigError, match="finite") as refused:
        compose(["attention=kha_linear", f"{field}={text}"])
    assert refused.value.field.startswith(field)


@pytest.mark.parametrize("field", ["run.dir", "run.name", "data.train", "data.cache_dir", "telemetry.wandb.project"])
def test_a_nul_in_any_text_is_refused_and_named(field: str) -> None:
    with pytest.raises(ConfigError, match="NUL"):
        compose([f"{field}='a\0b'"])


def test_what_is_declared_is_within_what_its_type_can_hold() -> None:
    for limit in LIMITS.values():
        assert -INT64 <= limit.low <= INT64 and (limit.high is None or limit.low < limit.high <= LARGEST_FP32)
    check_limits(to_plain(compose([])))
