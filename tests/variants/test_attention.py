"""What an attention variant says of itself, and what follows from it wherever a run is judged or planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from kha_train.config.compose import compose
from kha_train.config.resolve import Device, decide, invalid_backend, resolve_decoding
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.variants.attention import HeadShape, InputWidths, InteractionOptions, Partners
from kha_train.variants.backends import TRAITS, Asked
from kha_train.variants.bases import GroupedQueryOptions
from kha_train.variants.registry import BASES

HOPPER = Device("cuda", (9, 0))


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(GroupedQueryOptions):
    """A variant that nobody has heard of, and that works on its scores."""

    asks: ClassVar[Asked] = "scores"


def with_base(config: RunConfig, cls: type[GroupedQueryOptions]) -> RunConfig:
    """`config` with a base of another class and name."""
    options = cls(name="unheard_of", query_heads=4, kv_heads=2, head_dim=16)
    return replace(config, attention=replace(config.attention, base=options))


def test_a_variant_that_works_on_its_scores_gets_the_backend_that_holds_them_without_being_named() -> None:
    plain = with_base(compose(["attention.backend=auto"]), GroupedQueryOptions)
    scored = with_base(plain, ScoredOptions)
    assert decide(plain, HOPPER).backend.name == "varlen"
    assert decide(scored, HOPPER).backend == ("eager", "unheard_of works on the scores")
    assert resolve_decoding(scored).backend.name == "eager" and resolve_decoding(plain).backend.name == "sdpa"


@pytest.mark.parametrize("backend", [name for name, traits in TRAITS.items() if "softmax" in traits.serves])
def test_another_backend_is_refused_for_it(backend: str) -> None:
    config = with_base(compose(["data.isolate_documents=false", f"attention.backend={backend}"]), ScoredOptions)
    problem = invalid_backend(config)
    if backend == "eager":
        assert problem is None
    else:
        assert problem is not None and problem.field == "attention.backend" and problem.allowed == "eager, auto"
        assert invalid_backend(with_base(config, GroupedQueryOptions)) is None


@pytest.mark.parametrize("positions", ["alibi", "learned", "none"])
@pytest.mark.parametrize("name", sorted(BASES))
def test_a_base_judges_its_partners_from_plain_facts(name: str, positions: str) -> None:
    base = compose([f"attention={name}"]).attention.base
    impossible = name in ("gta", "mla") or (name in ("linear", "diff") and positions == "alibi")
    problem = base.conflict(Partners(qk_norm="none", positions=positions, seq_len=64, layers=2))
    assert (problem is not None) == impossible
    assert problem is None or problem.field == "attention.positions"
    assert base.conflict(Partners(qk_norm="none", positions="rope", seq_len=64, layers=2)) is None


def test_an_interaction_without_faster_ways_is_computed_by_its_definition() -> None:
    heads, inputs = HeadShape(4, 2, 16, 16), InputWidths(64, 64, 64, 64)
    way = InteractionOptions(name="anything").implementation(heads, inputs, 1 << 20, "triton")
    assert way.name == "eager" and not way.folded


def test_a_refusal_calls_the_base_by_its_own_name() -> None:
    with pytest.raises(ConfigError, match="mla attends to its latent"):
        compose(["attention=mla", "interaction@attention.interaction=knocking_mlp"])
