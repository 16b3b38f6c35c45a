"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kha_train import build_decoder, compose
from kha_train.errors import ConfigError
from kha_train.model.init import interaction_identities
from kha_train.optim import AdamW, interaction_settings, learning_rate, parameter_groups
from kha_train.variants.interactions import KnockingLinearOptions
from kha_train.variants.optimizer import AdamWOptions, OptimSection, ScheduleSection, SurgeSection

COSINE = OptimSection(lr=1.0, schedule=ScheduleSection(name="cosine", warmup=0.1, final=0.1))
WSD = OptimSection(lr=1.0, schedule=ScheduleSection(name="wsd", warmup=0.1, decay=0.2, final=0.1))


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    assert [learning_rate(COSINE, step, 100) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_final_share() -> None:
    assert learning_rate(COSINE, 55, 100) == pytest.approx(0.1 + 0.9 / 2)
    assert learning_rate(COSINE, 100, 100) == pytest.approx(0.1)


def test_cosine_equals_torchs_own() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=90, eta_min=0.1)
    for step in range(11, 101):
        sgd.step()
        theirs.step()
        assert learning_rate(COSINE, step, 100) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


def test_a_surge_multiplies_the_rate_of_its_steps_alone() -> None:
    surge = SurgeSection(factor=50.0, start=0.7, length=0.15)
    stressed = OptimSection(lr=1.0, schedule=ScheduleSection(name="wsd", warmup=0.1, decay=0.0, surge=surge))
    rates = {step: learning_rate(stressed, step, 200) for step in range(1, 201)}
    assert [step for step, rate in rates.items() if rate == 50.0] == list(range(141, 171))
    assert {rate for step, rate in rates.items() if 20 <= step <= 140 or step > 170} == {1.0}


def test_wsd_is_constant_and_then_falls_in_a_straight_line() -> None:
    assert {learning_rate(WSD, step, 100) for step in range(10, 81)} == {1.0}
    assert learning_rate(WSD, 90, 100) == pytest.approx(0.55)
    assert learning_rate(WSD, 100, 100) == pytest.approx(0.1)


@given(
    steps=st.integers(1, 2000),
    warmup=st.floats(0, 1),
    share=st.floats(0, 1),
    final=st.floats(0, 1),
    name=st.sampled_from(["cosine", "wsd"]),
)
def test_the_rate_never_leaves_its_bounds(steps: int, warmup: float, share: float, final: float, name: str) -> None:
    schedule = ScheduleSection(name=name, warmup=warmup, decay=(1 - warmup) * share, final=final)
    optim = OptimSection(lr=2.0, schedule=schedule)
    for step in {1, max(steps // 2, 1), steps}:
        rate = learning_rate(optim, step, steps)
        assert 0 <= rate <= 2.0 and math.isfinite(rate)


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    decoder = build_decoder(compose(["model.layers=3", "model.vocab_size=64", "attention=kha_mlp"]))
    groups = parameter_groups(decoder.named_parameters(), 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in decoder.parameters())
    for group in groups:
        dimensions = {parameter.dim() for parameter in group["params"]}
        assert (group["weight_decay"] == 0.0) == (dimensions == {1})


@pytest.mark.parametrize("variant", ["kha_mlp", "mea", "talking_heads"])
def test_interaction_parameters_have_groups_of_their_own_only_when_they_are_treated_apart(variant: str) -> None:
    """The groups decide how ZeRO lays parameters out and in which order norms are summed: by default as ever."""
    decoder = build_decoder(compose(["model.layers=2", "model.vocab_size=64", f"attention={variant}"]))
    named, apart = list(decoder.named_parameters()), interaction_identities(decoder)
    plain = [{**group, "params": [id(p) for p in group["params"]]} for group in parameter_groups(named, 0.1)]
    by_default = parameter_groups(named, 0.1, apart, interaction_settings(OptimSection(lr=1.0)))
    assert [{**group, "params": [id(p) for p in group["params"]]} for group in by_default] == plain
    settings = interaction_settings(OptimSection(lr=1.0, interaction_decay="identity", interaction_lr_scale=0.5))
    groups = [group for group in parameter_groups(named, 0.1, apart, settings) if "lr_scale" in group]
    mixes = {id(p) for name, p in named if ".maps." in name or ".compose." in name or "_mix." in name}
    assert {id(p) for group in groups for p in group["params"]} == mixes
    assert [group["name"] for group in groups] == ["blocks.0", "blocks.1"]
    for group in groups:
        assert (group["weight_decay"], group["identity_decay"], group["lr_scale"]) == (0.0, 0.1, 0.5)


def test_decay_to_the_identity_leaves_what_is_there_bit_for_bit() -> None:
    """p (1 - r) + r p rounds; what stands at its aim stays, however small the rate."""
    parameter = torch.nn.Parameter(torch.eye(5))
    adamw = AdamW([{"params": [parameter], "identity_decay": 0.1}], AdamWOptions(lr=3e-7, weight_decay=0.0))
    adamw.identities[parameter] = torch.eye(5)
    for _ in range(50):
        parameter.grad = torch.zeros(5, 5)
        adamw.step()
    assert torch.equal(parameter, torch.eye(5))


@pytest.mark.parametrize(
    "settings",
    [("attention=gqa",), ("attention=mla",), ("attention=mea", "attention.interaction.compose=[]")],
    ids=["gqa", "mla", "mea without composition"],
)
def test_decay_to_the_identity_is_refused_where_there_is_none_with_a_fix_that_works(settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*settings, "optim.interaction_decay=identity"])
    assert caught.value.field == "optim.interaction_decay"
    assert compose([*settings, caught.value.fix]).optim.interaction_decay == "zero"
    compose([*settings, "optim.interaction_decay=none", "optim.interaction_lr_scale=0"])


def test_a_variant_that_knows_no_identity_of_a_matrix_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnockingLinearOptions, "matrices", {"map": None})
    with pytest.raises(ConfigError, match="no value of q map leaves heads unchanged"):
        compose(["attention=kha_linear", "optim.interaction_decay=identity"])


def test_a_composition_of_as_many_heads_has_an_identity_and_one_of_others_has_none() -> None:
    settings = ["attention=mea", "model.kv_heads=2", "optim.interaction_decay=identity"]
    compose([*settings, "attention.interaction.component_heads=2"])
    with pytest.raises(ConfigError, match="no value of k leaves heads unchanged"):
        compose([*settings, "attention.interaction.component_heads=1"])


def test_a_negative_scale_of_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="interaction_lr_scale"):
        compose(["attention=kha_mlp", "optim.interaction_lr_scale=-1"])


def test_each_layer_has_a_group_of_its_own() -> None:
    decoder = build_decoder(compose(["model.layers=3", "model.vocab_size=64"]))
    names = [group["name"] for group in parameter_groups(decoder.named_parameters(), 0.1)]
    assert names == ["outside layers", "vectors", "blocks.0", "blocks.1", "blocks.2"]


def test_a_state_that_maps_and_others_have_is_one_kind_of_a_checkpoint() -> None:
    class SharedOptions(OptimSection):
        states, map_states = ("exp_avg", "exp_avg_sq"), ("exp_avg",)

    assert SharedOptions.kinds() == ("master", "exp_avg", "exp_avg_sq")
