"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kha_train import build_decoder, compose
from kha_train.config.schema import OptimSection, ScheduleSection
from kha_train.optim import learning_rate, parameter_groups

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


def test_each_layer_has_a_group_of_its_own() -> None:
    decoder = build_decoder(compose(["model.layers=3", "model.vocab_size=64"]))
    names = [group["name"] for group in parameter_groups(decoder.named_parameters(), 0.1)]
    assert names == ["outside layers", "vectors", "blocks.0", "blocks.1", "blocks.2"]
