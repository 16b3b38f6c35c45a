"""Balancing by the RMS rule, and the figures of a step's balance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.model.decoder import build_decoder
from kha_train.model.moe.balance import BIAS_UPDATES, balance_metrics, load_statistics, rms_update


def test_the_rms_rule_by_hand():
    # shares 3/4, 1/8, 1/8, 0; excesses 1/2, -1/8, -1/8, -1/4; their mean square 11/128
    bias_E = torch.tensor([0.3, -0.1, -0.1, -0.1])
    rms = math.sqrt(11 / 128)
    expected = [0.3 - 0.01 * 0.5 / rms, *[-0.1 + 0.01 * 0.125 / rms] * 2, -0.1 + 0.01 * 0.25 / rms]
    moved = rms_update(bias_E, torch.tensor([6, 1, 1, 0]), 0.01)
    torch.testing.assert_close(moved, torch.tensor(expected))


def test_the_sign_rules_by_hand():
    bias_E, load_E = torch.tensor([0.3, -0.1, -0.1, -0.1]), torch.tensor([6, 2, 1, 0])
    wang = BIAS_UPDATES["sign"](bias_E, load_E, 0.01)
    torch.testing.assert_close(wang, torch.tensor([0.29, -0.09, -0.09, -0.09]))
    # signs of 1/E - F are -1, 1, 1, 1; their mean is 1/2
    ling = BIAS_UPDATES["sign_zero_mean"](bias_E, load_E, 0.01)
    torch.testing.assert_close(ling, torch.tensor([0.285, -0.095, -0.095, -0.095]))


@pytest.mark.parametrize("rule", BIAS_UPDATES)
def test_every_rule_leaves_a_balanced_or_an_empty_load_alone_in_fp32(rule):
    bias_E = torch.linspace(-0.3, 0.3, 7)
    for load in (3, 0, 1_398_101):
        assert torch.equal(
            BIAS_UPDATES[rule](bias_E, torch.full((7,), load), 1e-3), bias_E - (bias_E.mean() if rule == "rms" else 0)
        )


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=16))
def test_the_bias_keeps_mean_zero_and_moves_by_exactly_the_rate(loads):
    moved = rms_update(torch.zeros(len(loads)), torch.tensor(loads), 1e-3)
    assert moved.isfinite().all() and abs(moved.mean().item()) < 1e-8
    rms = moved.square().mean().sqrt().item()
    assert rms == (0.0 if len(set(loads)) == 1 else pytest.approx(1e-3, rel=1e-3))


def test_a_balanced_or_an_empty_load_leaves_the_bias_alone():
    bias_E = torch.tensor([0.25, -0.25, 0.5, -0.5])
    for load in ([3, 3, 3, 3], [0, 0, 0, 0]):
        assert torch.equal(rms_update(bias_E, torch.tensor(load), 1e-3), bias_E)


def test_a_common_offset_of_the_bias_is_removed():
    moved = rms_update(torch.tensor([1.25, 0.75, 1.5, 0.5]), torch.tensor([6, 1, 1, 0]), 1e-3)
    assert abs(moved.mean().item()) < 1e-6


@pytest.mark.parametrize("rule", BIAS_UPDATES)
def test_a_skewed_router_is_balanced_within_250_steps_and_stays_so(rule, make_config):
    """16 experts top-2, 8,192 fresh tokens a step, of which a common direction favours few experts."""
    moe = {"experts": 16, "bias_update": rule, "bias_update_rate": 1e-3}
    decoder = build_decoder(make_config(moe=moe, model={"layers": 1}))
    router, generator = decoder.routers()[0], torch.Generator().manual_seed(4)
    largest = []
    with torch.no_grad():
        router.weight.copy_(0.04 * torch.randn(16, 64, generator=generator))
        router.weight[:, 0] = torch.linspace(-0.6, 0.6, 16)
        for _ in range(450):
            x_ND = torch.randn(8192, 64, generator=generator)
            x_ND[:, 0] = 1.0
            load_LE = router(x_ND).load_E[None]
            largest.append(load_statistics(load_LE, decoder.selection_bias_LE()).maxvio.item())
            decoder.finish_step(load_LE)
    assert largest[0] >= 4
    assert max(largest[250:]) < 1.2


def test_statistics_by_hand():
    load_LE = torch.tensor([[8, 0, 4, 4], [4, 4, 4, 4]])
    bias_LE = torch.tensor([[0.1, -0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    entropy = (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)
    by_layer = {
        "maxvio": [2, 1],
        "load_cv": [math.sqrt(8) / 4, 0],
        "dead_fraction": [1 / 4, 0],
        "load_entropy": [entropy, 1],
        "bias_range": [0.3, 0],
    }
    got = load_statistics(load_LE, bias_LE)._asdict()
    assert {name: value.tolist() for name, value in got.items()} == {
        name: pytest.approx(values, rel=1e-5) for name, values in by_layer.items()
    }
    metrics = balance_metrics(load_LE, bias_LE)
    assert {name: metrics[f"moe/{name}_by_layer"] for name in by_layer} == {
        name: pytest.approx(values, rel=1e-5) for name, values in by_layer.items()
    }
    means = {f"moe/{name}": sum(values) / 2 for name, values in by_layer.items() if name != "bias_range"}
    assert {name: metrics[name] for name in means} == pytest.approx(means, rel=1e-5)
    assert metrics["moe/bias_range"] == pytest.approx(0.3) and metrics["moe/maxvio_worst"] == 2
    assert balance_metrics(torch.zeros(0, 0), torch.zeros(0, 0)) == {}


def test_a_single_expert_has_an_even_load_and_not_a_collapsed_one():
    metrics = balance_metrics(torch.tensor([[512], [0]]), torch.zeros(2, 1))
    assert metrics["moe/load_entropy"] == 1 and metrics["moe/maxvio_by_layer"][0] == 1


def test_the_bias_is_updated_in_every_layer_and_carries_no_gradient(make_config):
    decoder = build_decoder(make_config())
    load_LE = torch.tensor([[9, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 9]])
    decoder.finish_step(load_LE)
    bias_LE = decoder.selection_bias_LE()
    assert bias_LE.argmin(1).tolist() == [0, 7] and not bias_LE.requires_grad
    assert bias_LE.dtype == torch.float32
