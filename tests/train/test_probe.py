"""The largest attention logit against the formula, with documents, grouped heads and sampling."""

# T tokens  H query heads  G key/value heads  K head width

from __future__ import annotations

import pytest
import torch

from kha_train.train.probe import _largest_logit, _watched


@pytest.mark.parametrize("starts", [[0, 48], [0, 5, 20, 48]])
def test_the_largest_logit_is_that_of_a_pair_that_may_attend(starts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q_THK, k_UGK = torch.randn(48, 4, 8, generator=generator), torch.randn(48, 2, 8, generator=generator)
    q_THK[10] *= 100.0
    expected = max(
        float(q_THK[t, h] @ k_UGK[u, h // 2]) * 0.3
        for t in range(48)
        for u in range(t + 1)
        for h in range(4)
        if sum(start <= t for start in starts[:-1]) == sum(start <= u for start in starts[:-1])
    )
    found = _largest_logit(q_THK, k_UGK, torch.tensor(starts, dtype=torch.int32), 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_long_rows_are_sampled_over_their_whole_length() -> None:
    q_THK, k_UGK = torch.zeros(1000, 1, 2), torch.ones(1000, 1, 2)
    q_THK[-1] = 7.0
    assert _largest_logit(q_THK, k_UGK, torch.tensor([0, 1000], dtype=torch.int32), 1.0).item() == 14.0


def test_padding_is_not_looked_at() -> None:
    q_BTHK, k_BUGK = torch.ones(1, 10, 1, 2), torch.ones(1, 10, 1, 2)
    q_BTHK[0, 7:] = k_BUGK[0, 7:] = 100.0
    module, found = torch.nn.Module(), []
    module.attend = lambda *given: given[0]
    for tokens in (7, 10):
        with _watched(module, found.append, torch.tensor([0, 3, 7, 10]), tokens):
            module.attend(q_BTHK, k_BUGK, 1.0)
    assert [logit.item() for logit in found] == [2.0, 20_000.0]
