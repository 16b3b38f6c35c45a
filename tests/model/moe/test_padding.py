"""Places without a token are not routed: they count in no load, bias, auxiliary or z-loss, and in no expert's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kha_train.config.schema import AuxiliaryLossSection, RunConfig
from kha_train.model.decoder import Decoder, DecoderOutput, build_decoder
from kha_train.model.moe.router import Routing

ROWS, LENGTHS, T, EXPERTS, TOP_K = 3, (40, 7, 64), 64, 8, 2
"""Rows of unequal content, the last of them full."""
SCOPES = ("sequence", "previous_step", "micro_batch")
Make = Callable[..., RunConfig]


def configured(make_config: Make, scope: str, moe: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """All that counts tokens at once: auxiliary loss, z-loss, routing warm-up, shared experts."""
    auxiliary = AuxiliaryLossSection(weight=0.1, scope=scope)
    counting = {"auxiliary_loss": auxiliary, "z_loss_weight": 0.01, "routing_warmup_steps": 4, "shared_experts": 1}
    return make_config(moe={**counting, **(moe or {})}, **sections)


def built(config: RunConfig) -> Decoder:
    """A decoder with a router far from indifferent, two steps into its warm-up, after an uneven step."""
    decoder = build_decoder(config)
    for router in decoder.routers():
        router.weight.data.mul_(20)
    for load in ([9, 1, 3, 3, 1, 2, 2, 3], [2, 2, 9, 1, 1, 5, 2, 2]):
        decoder.finish_step(torch.tensor([load] * len(decoder.routers())))
    return decoder


def packed(fill: int = 0) -> dict[str, Any]:
    """Rows of T places, each with one document and padding (of id `fill`), as `best_fit` makes them."""
    tokens_BT, labels_BT = torch.full((ROWS, T), fill), torch.full((ROWS, T), -100)
    borders, positions = [0], []
    for row, (length, ids) in enumerate(zip(LENGTHS, documents(), strict=True)):
        tokens_BT[row, :length] = ids
        labels_BT[row, : length - 1] = ids[1:]
        borders += sorted({row * T + length, (row + 1) * T})
        positions.append([*range(length), *range(T - length)])
    places = [row * T + place for row, length in enumerate(LENGTHS) for place in range(length)]
    return {
        "tokens_BT": tokens_BT,
        "labels_BT": labels_BT,
        "positions_BT": torch.tensor(positions),
        "cu_seqlens_S": torch.tensor(borders, dtype=torch.int32),
        "max_seqlen": max(LENGTHS),
        "samples_B": torch.arange(ROWS),
        "real_R": torch.tensor(places),
    }


def documents() -> list[Tensor]:
    """The ids of each row's document."""
    drawn = torch.randint(1, 256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    return list(drawn.split(LENGTHS))


def alone(number: int) -> dict[str, Any]:
    """One document as a row of its own length, without padding."""
    ids = documents()[number]
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    return {"tokens_BT": ids[None], "labels_BT": labels[None], "samples_B": torch.tensor([number])}


def backward(output: DecoderOutput) -> None:
    (output.loss_sum + output.auxiliary.total_sum).backward()


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("scope", ["sequence", "previous_step"])
@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_a_row_with_padding_gives_the_loss_and_gradients_of_its_document_alone(
    scope: str, backend: str, recomputed: str, make_config: Make
) -> None:
    engine = {"activation_checkpointing": recomputed}
    decoder = built(configured(make_config, scope, {"backend": backend}, engine=engine))
    together = decoder(**packed())
    backward(together)
    found = gradients(decoder)
    decoder.zero_grad()
    apart = [decoder(**alone(number)) for number in range(ROWS)]
    for output in apart:
        backward(output)
    assert together.loss_sum.item() == pytest.approx(sum(output.loss_sum.item() for output in apart), rel=1e-6)
    assert torch.equal(together.load_LE, sum(output.load_LE for output in apart))
    for name in ("total_sum", "balance_sum", "z_sum"):
        expected = sum(getattr(output.auxiliary, name).item() for output in apart)
        assert getattr(together.auxiliary, name).item() == pytest.approx(expected, rel=1e-6)
    for name, expected in gradients(decoder).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_loads_biases_and_losses_are_those_of_the_tokens_computed_by_hand(
    scope: str, score: str, make_config: Make
) -> None:
    decoder = built(configured(make_config, scope, {"routing_warmup_steps": 0, "score": score}))
    inputs: list[Tensor] = []
    for block in decoder.blocks:
        block.feed_forward.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    routers = decoder.routers()
    biases_LE = decoder.selection_bias_LE()
    previous = [getattr(router, "previous_share", None) for router in routers]
    output = decoder(**packed())

    balance = z = 0.0
    for layer, (router, x_BTD) in enumerate(zip(routers, inputs, strict=True)):
        tokens = [(row, x_BTD[row, place]) for row, length in enumerate(LENGTHS) for place in range(length)]
        counts, shares = torch.zeros(ROWS, EXPERTS), torch.zeros(ROWS, EXPERTS)
        for row, x_D in tokens:
            logit_E = (router.weight.detach() * x_D).sum(1)
            score_E = logit_E.sigmoid() if score == "sigmoid" else logit_E.softmax(0)
            chosen = (score_E + biases_LE[layer]).argsort(descending=True)[:TOP_K]
            counts[row, chosen] += 1
            shares[row] += score_E / score_E.sum()
            z += logit_E.exp().sum().log().square().item()
        assert output.load_LE[layer].tolist() == counts.sum(0).tolist()
        if scope == "sequence":
            fraction_BE = counts / (TOP_K * torch.tensor(LENGTHS)[:, None])
            balance += EXPERTS * (fraction_BE * shares).sum().item()
        elif scope == "micro_batch":
            balance += EXPERTS * (counts.sum(0) / counts.sum() * shares.sum(0)).sum().item()
        else:
            balance += (previous[layer] * shares.sum(0)).sum().item()
    assert output.load_LE.sum(1).tolist() == [sum(LENGTHS) * TOP_K] * len(routers)
    assert output.auxiliary.balance_sum.item() == pytest.approx(balance, rel=1e-5)
    assert output.auxiliary.z_sum.item() == pytest.approx(z, rel=1e-5)

    decoder.finish_step(output.load_LE)
    excess_LE = output.load_LE / output.load_LE.sum(1, keepdim=True) - 1 / EXPERTS
    moved_LE = biases_LE - 1e-3 * excess_LE / excess_LE.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(decoder.selection_bias_LE(), moved_LE - moved_LE.mean(1, keepdim=True))


def test_whatever_stands_in_padding_changes_no_number(make_config: Make) -> None:
    decoder = built(configured(make_config, "sequence"))
    answers = []
    for fill in (0, 77):
        decoder.zero_grad()
        output = decoder(**packed(fill))
        backward(output)
        answers.append([output.loss_sum, output.load_LE, *output.auxiliary, *gradients(decoder).values()])
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_padding_costs_no_row_of_an_expert(backend: str, make_config: Make) -> None:
    decoder, rows = built(configured(make_config, "sequence", {"backend": backend})), []

    def noted(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x_ND: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
            rows.append((len(x_ND), len(routing.expert_NJ), routing.load_E.sum().item()))
            return run(x_ND, gate_up, down, routing)

        return call

    for block in decoder.blocks:
        block.feed_forward.experts.run = noted(block.feed_forward.experts.run)
        block.feed_forward.shared.register_forward_pre_hook(lambda module, given: rows.append((len(given[0]),)))
    decoder(**packed())
    count = sum(LENGTHS)
    assert rows == [(count, count, count * TOP_K), (count,)] * len(decoder.blocks)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_a_micro_batch_of_nothing_but_padding_counts_nothing_and_gives_every_parameter_a_gradient_of_zero(
    scope: str, backend: str, make_config: Make
) -> None:
    decoder = built(configured(make_config, scope, {"backend": backend, "routing_warmup_steps": 0}))
    nothing = torch.empty(0, dtype=torch.int64)
    tokens_BT = torch.zeros(2, T, dtype=torch.int64)
    output = decoder(tokens_BT, torch.full_like(tokens_BT, -100), samples_B=torch.tensor([-1, -1]), real_R=nothing)
    backward(output)
    assert output.loss_sum.item() == 0 and output.load_LE.sum() == 0
    assert [value.item() for value in output.auxiliary] == [0.0, 0.0, 0.0]
    # Ranks reduce gradients together: a parameter without one would leave the others waiting.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in decoder.parameters())


def test_rows_without_padding_are_computed_as_if_padding_did_not_exist(make_config: Make) -> None:
    """Listing all places is the same function, up to the order of sums; listing none runs the code without padding."""
    decoder = built(configured(make_config, "sequence"))
    tokens_BT = torch.randint(1, 256, (2, T), generator=torch.Generator().manual_seed(2))
    plain = decoder(tokens_BT, tokens_BT)
    named = decoder(tokens_BT, tokens_BT, real_R=torch.arange(2 * T))
    assert torch.equal(plain.load_LE, named.load_LE)
    torch.testing.assert_close(named.loss_sum, plain.loss_sum)
    torch.testing.assert_close(named.auxiliary.total_sum, plain.auxiliary.total_sum)
