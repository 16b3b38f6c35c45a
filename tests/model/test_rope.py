"""Rotary embedding against complex multiplication, and its defining property."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.model.rope import UNSCALED, Rotary, Scaling, rotary_table, rotate


def turned(x_BTHK, positions_BT, theta=10_000.0):
    cos_PR, sin_PR = rotary_table(int(positions_BT.max()) + 1, x_BTHK.shape[-1], theta)
    return rotate(x_BTHK, Rotary(cos_PR[positions_BT], sin_PR[positions_BT]))


def test_rotation_equals_complex_multiplication_in_the_rotate_half_layout():
    x_BTHK = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions_BT = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 1, 9, 2]])
    frequency_R = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = positions_BT[..., None, None] * frequency_R
    z = torch.complex(x_BTHK[..., :4].double(), x_BTHK[..., 4:].double()) * torch.exp(1j * angle)
    torch.testing.assert_close(turned(x_BTHK, positions_BT), torch.cat((z.real, z.imag), -1).float())


def test_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 1, 16, generator=generator), torch.randn(1, 1, 1, 16, generator=generator)
    scores = [
        (turned(q, torch.tensor([[start + 5]])) * turned(k, torch.tensor([[start]]))).sum().item()
        for start in (0, 1, 100)
    ]
    torch.testing.assert_close(torch.tensor(scores), torch.full((3,), scores[0]), rtol=1e-4, atol=1e-4)


def test_tables_are_fp32_but_rounded_from_fp64():
    cos_PR, _ = rotary_table(8192, 128, 10_000.0)
    exact = torch.cos(torch.tensor(8191.0 * 10_000.0 ** (-2.0 / 128), dtype=torch.float64))
    assert cos_PR.dtype == torch.float32 and cos_PR[8191, 1] == exact.float()


SCALINGS = {
    "linear": (Scaling("linear", 2.5), 64, 1e4),
    "yarn as Qwen3 has it": (Scaling("yarn", 4.0, 32768), 128, 1e6),
    "yarn as DeepSeek-V3 has it": (Scaling("yarn", 40.0, 4096, 32.0, 1.0, 1.0), 64, 1e4),
    "short rows, where both borders are cut off": (Scaling("yarn", 16.0, 8, 32.0, 0.001), 16, 1e4),
    "borders that meet": (Scaling("yarn", 8.0, 128, 1.01, 1.0), 4, 1e8),
    "rows so short that all dimensions turn too slowly": (Scaling("yarn", 8.0, 1, 32.0, 1.0), 16, 2.0),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_and_magnitude_are_those_of_transformers(name):
    scaling, turned, theta = SCALINGS[name]
    unscaled, found = compared_with_transformers(scaling, turned, theta)
    assert not torch.equal(found, unscaled) or "too slowly" in name


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    factor=st.floats(1.0, 64.0),
    original=st.integers(1, 2**20),
    slow=st.floats(1e-3, 64.0),
    ratio=st.floats(1.001, 64.0),
    planes=st.integers(1, 64),
    theta=st.floats(1.01, 1e8),
)
def test_yarn_is_that_of_transformers_for_any_settings(factor, original, slow, ratio, planes, theta):
    compared_with_transformers(Scaling("yarn", factor, original, slow * ratio, slow), 2 * planes, theta)


def compared_with_transformers(scaling, turned, theta):
    """Frequencies before and after the scaling, once transformers computed the same."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": scaling.name, "rope_theta": theta, "factor": scaling.factor}
    if scaling.name == "yarn":
        rope |= {"original_max_position_embeddings": scaling.original, "attention_factor": scaling.attention_factor}
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    config = transformers.LlamaConfig(head_dim=turned, rope_parameters=rope, max_position_embeddings=2**20)
    expected, magnitude = ROPE_INIT_FUNCTIONS[scaling.name](config, torch.device("cpu"))
    unscaled = theta ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    found = scaling.frequencies(unscaled, theta)
    # They compute in fp32.
    torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    return unscaled, found


def test_the_table_holds_the_scaled_angles_times_the_magnitude():
    scaling = Scaling("yarn", 4.0, 64)
    cos_PR, sin_PR = rotary_table(300, 16, 10_000.0, scaling)
    frequency_R = scaling.frequencies(10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16), 10_000.0)
    turn = torch.exp(1j * 299 * frequency_R) * (1 + math.log(4.0) / 10)
    assert torch.equal(cos_PR[299], turn.real.float()) and torch.equal(sin_PR[299], turn.imag.float())
    for plain, none in zip(rotary_table(300, 16, 10_000.0), rotary_table(300, 16, 10_000.0, UNSCALED), strict=True):
        assert torch.equal(plain, none)
