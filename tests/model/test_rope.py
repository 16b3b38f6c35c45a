"""Rotary embedding against complex multiplication, and its defining property."""

import torch

from kha_train.model.rope import Rotary, rotary_table, rotate


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
