"""The router: sigmoid scores, a bias that affects only the selection, renormalised weights."""

import pytest
import torch

from kha_train.model.decoder import build_decoder
from kha_train.model.moe.router import count_experts


def fresh_router(make_config, **moe):
    router = build_decoder(make_config(moe=moe)).blocks[0].feed_forward.router
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    return router


def test_weights_are_the_chosen_scores_over_their_sum_times_the_scaling(make_config):
    router = fresh_router(make_config, top_k=3, routed_scaling=2.5)
    x_ND = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) / 8
    routing = router(x_ND)
    scores = 1 / (1 + torch.exp(-(x_ND.double() @ router.weight.T.double())))
    for token in range(20):
        best = sorted(range(8), key=lambda expert: -scores[token, expert])[:3]
        assert sorted(routing.expert_NJ[token].tolist()) == sorted(best)
        chosen = scores[token, routing.expert_NJ[token]]
        torch.testing.assert_close(routing.weight_NJ[token].double(), 2.5 * chosen / chosen.sum(), rtol=1e-5, atol=1e-6)


def test_the_selection_bias_chooses_but_never_weighs(make_config):
    router = fresh_router(make_config)
    x_ND = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) / 8
    router.selection_bias[5] = 10.0
    routing = router(x_ND)
    assert (routing.expert_NJ == 5).any(dim=1).all() and routing.load_E[5] == 50
    score_NE = torch.sigmoid(x_ND @ router.weight.T)
    chosen_NJ = score_NE.gather(1, routing.expert_NJ)
    torch.testing.assert_close(routing.weight_NJ, 2.5 * chosen_NJ / chosen_NJ.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_fp32_whatever_the_model_runs_in(dtype, make_config):
    router = fresh_router(make_config).to(dtype)
    x_ND = (torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) / 8).to(dtype)
    routing = router(x_ND)
    assert routing.weight_NJ.dtype == torch.float32
    expected = torch.sigmoid(x_ND.float() @ router.weight.float().T).gather(1, routing.expert_NJ)
    torch.testing.assert_close(routing.weight_NJ, 2.5 * expected / expected.sum(1, keepdim=True))


def test_a_bf16_router_rounds_logits_and_scores_and_nothing_after_them(make_config):
    router = fresh_router(make_config, router_precision="bf16", top_k=2, renormalize=False, routed_scaling=3.0)
    x_ND = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) / 8
    routing = router(x_ND)
    exact_NE = x_ND.bfloat16().double() @ router.weight.bfloat16().double().T
    score_NE = torch.sigmoid(exact_NE.bfloat16().double()).bfloat16().float()
    # 3 s of a bf16 score is exact in fp32, and not in bf16.
    assert torch.equal(routing.weight_NJ, 3.0 * score_NE.gather(1, routing.expert_NJ))
    assert not torch.equal(routing.weight_NJ, routing.weight_NJ.bfloat16().float())
    router.selection_bias[5] = 2.0**-10
    tied_N = (score_NE == score_NE[:, 5:6]).sum(1) > 1
    ahead_N = (score_NE > score_NE[:, 5:6]).sum(1) < 2
    # A bias too small for bf16 still decides between experts of equal scores.
    assert tied_N.any() and (router(x_ND).expert_NJ[tied_N & ahead_N] == 5).any(dim=1).all()
    assert router(x_ND).weight_NJ.requires_grad


def test_scores_of_zero_do_not_divide_by_zero(make_config):
    router = fresh_router(make_config)
    with torch.no_grad():
        router.weight.fill_(-1e4)
    routing = router(torch.ones(4, 64))
    routing.weight_NJ.sum().backward()
    assert routing.weight_NJ.isfinite().all() and router.weight.grad.isfinite().all()


def test_loads_count_every_routed_token():
    expert_NJ = torch.randint(0, 8, (100, 2), generator=torch.Generator().manual_seed(2))
    assert torch.equal(count_experts(expert_NJ, 8), torch.bincount(expert_NJ.flatten(), minlength=8))
