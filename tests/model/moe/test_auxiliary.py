"""Auxiliary losses against their formulas, transformers', and themselves under another split."""

from __future__ import annotations

import pytest
import torch

from kha_train.config.schema import AuxiliaryLossSection
from kha_train.model.decoder import build_decoder
from kha_train.model.moe.balance import batch_balance_loss, expected_balance_loss, relative_load, sequence_balance_loss
from kha_train.model.moe.router import count_experts
from kha_train.model.moe.warmup import standard_normal

ROWS, TOKENS, EXPERTS, TOP_K = 4, 16, 8, 2
SCOPES = ("sequence", "previous_step", "micro_batch")


def routed(seed=0):
    logits = torch.randn(ROWS * TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    share_NE = logits.softmax(-1)
    return share_NE, share_NE.topk(TOP_K, -1).indices


def test_the_value_is_1_when_loads_and_scores_are_even_and_experts_over_top_k_at_worst():
    even_NE = torch.full((ROWS * TOKENS, EXPERTS), 1 / EXPERTS)
    everyone_NJ = torch.arange(ROWS * TOKENS * TOP_K).remainder(EXPERTS).view(-1, TOP_K)
    load_E = count_experts(everyone_NJ, EXPERTS)
    for value in (
        sequence_balance_loss(even_NE, everyone_NJ, ROWS),
        batch_balance_loss(even_NE, load_E),
        expected_balance_loss(even_NE, relative_load(load_E)),
    ):
        assert value.item() / (ROWS * TOKENS) == pytest.approx(1.0)
    one_NE = torch.zeros(ROWS * TOKENS, EXPERTS)
    one_NE[:, :TOP_K] = 1 / TOP_K
    first_NJ = torch.arange(TOP_K).repeat(ROWS * TOKENS, 1)
    assert sequence_balance_loss(one_NE, first_NJ, ROWS).item() / (ROWS * TOKENS) == pytest.approx(EXPERTS / TOP_K)


def test_the_sequence_form_is_the_formula_row_by_row():
    share_NE, expert_NJ = routed()
    expected = 0.0
    for row in range(ROWS):
        tokens = range(row * TOKENS, (row + 1) * TOKENS)
        for expert in range(EXPERTS):
            fraction = sum((expert_NJ[n] == expert).sum().item() for n in tokens) * EXPERTS / (TOP_K * TOKENS)
            expected += TOKENS * fraction * sum(share_NE[n, expert].item() for n in tokens) / TOKENS
    assert sequence_balance_loss(share_NE, expert_NJ, ROWS).item() == pytest.approx(expected, rel=1e-5)


def test_the_micro_batch_form_times_top_k_is_that_of_transformers():
    olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    logits = torch.randn(ROWS * TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    share_NE = logits.softmax(-1)
    load_E = count_experts(share_NE.topk(TOP_K, -1).indices, EXPERTS)
    theirs = olmoe.load_balancing_loss_func((logits,), EXPERTS, TOP_K)
    ours = batch_balance_loss(share_NE, load_E) / (ROWS * TOKENS)
    assert theirs.item() == pytest.approx(TOP_K * ours.item(), rel=1e-5)


def skewed(make_config, scope, **moe):
    decoder = build_decoder(
        make_config(moe={"auxiliary_loss": section(scope), "z_loss_weight": 1e-3, **moe}, model={"layers": 3})
    )
    with torch.no_grad():
        for router in decoder.routers():
            router.weight.mul_(30)
    return decoder


def section(scope):
    return AuxiliaryLossSection(weight=0.1, scope=scope)


def gradients(decoder, tokens_BT, samples_B, rows):
    """Summed over micro-batches of `rows` rows, with a load of the step before."""
    decoder.zero_grad()
    decoder.finish_step(torch.tensor([[9, 1, 3, 3, 1, 2, 2, 3]] * len(decoder.routers())))
    totals = torch.zeros(3)
    for part, samples in zip(tokens_BT.split(rows), samples_B.split(rows), strict=True):
        output = decoder(part, part, samples_B=samples)
        (output.loss_sum + output.auxiliary.total_sum).backward()
        totals += torch.stack([output.auxiliary.total_sum.detach(), *output.auxiliary[1:]])
    return totals, {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_micro_batch_form_depends_on_the_split(scope, make_config):
    tokens_BT = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(5))
    results = []
    for rows in (4, 1):
        decoder = skewed(make_config, scope, bias_update_rate=0.0)
        results.append(gradients(decoder, tokens_BT, torch.arange(4), rows))
    (whole, whole_grads), (split, split_grads) = results
    same = torch.allclose(whole, split, rtol=1e-5)
    assert same is (scope != "micro_batch")
    if same:
        for name, gradient in whole_grads.items():
            torch.testing.assert_close(split_grads[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_recomputation_changes_neither_losses_nor_loads_nor_gradients(scope, make_config):
    tokens_BT = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
    answers = []
    for checkpointing in ("none", "full"):
        config = make_config(
            moe={"auxiliary_loss": section(scope), "routing_warmup_steps": 10, "z_loss_weight": 1e-3},
            engine={"activation_checkpointing": checkpointing},
        )
        decoder = build_decoder(config)
        output = decoder(tokens_BT, tokens_BT)
        (output.loss_sum + output.auxiliary.total_sum).backward()
        answers.append((output.load_LE, *output.auxiliary, *(p.grad for p in decoder.parameters())))
    for plain, recomputed in zip(*answers, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("scope", SCOPES)
def test_each_form_presses_a_skewed_router_towards_even_loads(scope, make_config):
    decoder = skewed(make_config, scope, bias_update_rate=0.0)
    tokens_BT = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam([router.weight for router in decoder.routers()], lr=0.01)
    worst = []
    for _ in range(40):
        optimizer.zero_grad()
        output = decoder(tokens_BT)
        output.auxiliary.total_sum.backward()
        optimizer.step()
        decoder.finish_step(output.load_LE)
        worst.append(output.load_LE.max().item())
    even = tokens_BT.numel() * 2 / 8
    # The load of the step before lags behind: that form swings around the balance.
    assert sum(worst[-10:]) / 10 - even < 0.6 * (worst[0] - even)


def test_nothing_auxiliary_is_computed_in_evaluation_or_when_not_asked_for(make_config):
    tokens_BT = torch.zeros(1, 8, dtype=torch.int64)
    assert build_decoder(make_config())(tokens_BT).auxiliary is None
    assert skewed(make_config, "sequence").eval()(tokens_BT).auxiliary is None


def test_the_z_loss_is_the_squared_logsumexp_of_the_logits(make_config):
    decoder = build_decoder(make_config(moe={"z_loss_weight": 0.5}, model={"layers": 1}))
    router = decoder.routers()[0]
    x_ND = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    expected = (x_ND @ router.weight.T).exp().sum(-1).log().square().sum()
    torch.testing.assert_close(router(x_ND).z_sum, expected)
    output = decoder(torch.zeros(1, 8, dtype=torch.int64))
    torch.testing.assert_close(output.auxiliary.total_sum, 0.5 * output.auxiliary.z_sum)


def test_the_warm_up_draws_standard_normal_numbers_that_only_their_place_decides():
    shape, step = torch.Size((4 * 64, 128)), torch.tensor([3.0])
    drawn = standard_normal(0, 1, step, torch.tensor([5, 6, 7, 8]), shape)
    assert abs(drawn.mean().item()) < 0.02 and abs(drawn.std().item() - 1) < 0.02
    assert abs((drawn > 1.96).float().mean().item() - 0.025) < 0.004
    alone = standard_normal(0, 1, step, torch.tensor([7]), torch.Size((64, 128)))
    assert torch.equal(alone, drawn[128:192])
    others = [
        standard_normal(1, 1, step, torch.tensor([7]), alone.shape),
        standard_normal(0, 2, step, torch.tensor([7]), alone.shape),
        standard_normal(0, 1, step + 1, torch.tensor([7]), alone.shape),
        standard_normal(0, 1, step, torch.tensor([8]), alone.shape),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((alone.flatten(), other.flatten())))[0, 1].item()) < 0.05


def test_the_warm_up_starts_with_chance_and_ends_with_the_router(make_config):
    config = make_config(moe={"routing_warmup_steps": 4, "experts": 16}, model={"layers": 1})
    decoder, plain = build_decoder(config), build_decoder(make_config(moe={"experts": 16}, model={"layers": 1}))
    router, x_ND = decoder.routers()[0], torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    agreement = []
    for _ in range(5):
        chosen, expected = router(x_ND, torch.arange(4)).expert_NJ, plain.routers()[0](x_ND).expert_NJ
        agreement.append((chosen.unsqueeze(-1) == expected.unsqueeze(-2)).any(-1).float().mean().item())
        router.finish_step(torch.ones(16))
    assert agreement[0] < 0.25 and agreement == sorted(agreement) and agreement[-1] == 1.0
    decoder.eval()
    assert torch.equal(router(x_ND).expert_NJ, plain.routers()[0](x_ND).expert_NJ)


@pytest.mark.parametrize("seed", [150_000_000_000_000, 2**63 - 1])
def test_the_warm_up_takes_every_seed_and_hashes_it_modulo_64_bits(seed):
    step, shape = torch.tensor([3]), torch.Size((8, 16))
    drawn = standard_normal(seed, 1, step, torch.tensor([7]), shape)
    wrapped = (seed * 65_537 + 1) % 2**64
    small = standard_normal(0, wrapped - 2**64 if wrapped >= 2**63 else wrapped, step, torch.tensor([7]), shape)
    assert torch.equal(drawn, small) and drawn.std().item() > 0.5
    assert not torch.equal(drawn, standard_normal(seed - 1, 1, step, torch.tensor([7]), shape))
