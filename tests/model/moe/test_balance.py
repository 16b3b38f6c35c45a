"""Balancing by the RMS rule, and the figures of a step's balance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.model.decoder import build_decoder
from kha_train.model.moe.balance import load_statistics, rms_update


def test_the_rms_rule_by_hand():
    # shares 3/4, 1/8, 1/8, 0; excesses 1/2, -1/8, -1/8, -1/4; their mean square 11/128
    bias_E = torch.tensor([0.3, -0.1, -0.1, -0.1])
    rms = math.sqrt(11 / 128)
    expected = [0.3 - 0.01 * 0.5 / rms, *[-0.1 + 0.01 * 0.125 / rms] * 2, -0.1 + 0.01 * 0.25 / rms]
    moved = rms_update(bias_E, torch.tensor([6, 1, 1, 0]), 0.01)
    torch.testing.assert_close(moved, torch.tensor(expected))


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


def test_updates_drive_the_largest_load_of_a_skewed_router_down(make_config):
    decoder = build_decoder(make_config(moe={"bias_update_rate": 5e-3}, model={"layers": 1}))
    router = decoder.blocks[0].moe.router
    x_ND = torch.randn(512, 64, generator=torch.Generator().manual_seed(4))
    x_ND[:, 0] = 1.0
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(-1.0, 1.0, 8)
        first = load_statistics(router(x_ND).load_E[None], decoder.selection_bias_LE())
        for _ in range(200):
            decoder.update_selection_bias(router(x_ND).load_E[None])
        last = load_statistics(router(x_ND).load_E[None], decoder.selection_bias_LE())
    assert first.maxvio > 2.5 and last.maxvio < 1.2
    assert last.load_cv < first.load_cv and last.load_entropy > first.load_entropy and last.bias_range > 0


def test_statistics_by_hand():
    load_LE = torch.tensor([[8, 0, 4, 4], [4, 4, 4, 4]])
    bias_LE = torch.tensor([[0.1, -0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    entropy = (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)
    got = load_statistics(load_LE, bias_LE)._asdict()
    expected = {
        "maxvio": (2 + 1) / 2,
        "load_cv": math.sqrt(8) / 4 / 2,
        "dead_fraction": 1 / 8,
        "load_entropy": (entropy + 1) / 2,
        "bias_range": 0.3,
    }
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected, rel=1e-5)


def test_the_bias_is_updated_in_every_layer_and_carries_no_gradient(make_config):
    decoder = build_decoder(make_config())
    load_LE = torch.tensor([[9, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 9]])
    decoder.update_selection_bias(load_LE)
    bias_LE = decoder.selection_bias_LE()
    assert bias_LE.argmin(1).tolist() == [0, 7] and not bias_LE.requires_grad
    assert bias_LE.dtype == torch.float32
