"""Experts shared among ranks give the same steps as experts that every rank holds whole: losses, norms, masters, with
every option of the router, with recomputation, accumulation, clipped and discarded steps, in fp32 and bf16."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train import compose
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError
from kha_train.estimate.exchange import exchange_bytes

WORKER = Path(__file__).with_name("expert_parallel_worker.py")
LAYERS = 2
TRAINING = ("attention=kha_mlp", "optim.lr=3e-3", "optim.grad_clip=0.5", "engine.micro_batch_size=2")
CASES: dict[str, dict[str, Any]] = {
    "a discarded step, ZeRO 1": {
        "overrides": [
            *("engine=zero1", "engine.micro_batch_size=2", "moe.auxiliary_loss.weight=0.01"),
            *("moe.auxiliary_loss.scope=sequence", "moe.z_loss_weight=0.001", "moe.expert_groups=2"),
        ],
        "discarded": 1,
    },
    "recomputed, shared experts, ZeRO 2": {
        "overrides": [
            *("engine=zero2", "engine.micro_batch_size=2", "engine.activation_checkpointing=full"),
            *("moe.shared_experts=1", "moe.score=softmax", "moe.auxiliary_loss.weight=0.01"),
            *("moe.auxiliary_loss.scope=previous_step", "moe.routing_warmup_steps=3"),
        ],
    },
    "selectively recomputed, padding, ZeRO 1": {
        "overrides": [
            *("engine=zero1", "engine.micro_batch_size=4", "engine.activation_checkpointing=selective"),
            *("moe.dense_layers=1", "moe.dense_width=64", "moe.auxiliary_loss.weight=0.01"),
        ],
        "padded": True,
    },
    "one rank gets every token, ZeRO 2": {
        "overrides": ["engine=zero2", "engine.micro_batch_size=4", "moe.renormalize=false"],
        "crowd": True,
    },
    "bf16 summed in fp32, ZeRO 1": {
        "overrides": ["engine=zero1", "engine.micro_batch_size=2", "engine.precision=bf16"],
        "micro": 4,
    },
}
EXACT = [name for name in CASES if not name.startswith("bf16")]


def settings(small: list[str], padded: list[str], name: str, case: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request of the worker."""
    shards = padded if case.get("padded") else small
    training = TRAINING if "attention" not in name else TRAINING[1:]
    return {**case, "overrides": [*shards, *training, *case["overrides"]], "steps": 4, "sizes": [2], **more}


@pytest.fixture(scope="module")
def answers(small: list[str], padded: list[str], run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What two ranks answered for every case, with experts whole ("1") and shared ("2")."""
    cases = {name: settings(small, padded, name, case) for name, case in CASES.items()}
    return run_ranks(WORKER, 2, layer=small, cases=cases)


def check_equal(shared: dict[str, Any], whole: dict[str, Any]) -> None:
    """Losses, norms, their parts and what the probe sees agree, and so do all masters, as far as they have moved."""
    for name in ("loss", "norm", "evaluated"):
        assert shared[name] == pytest.approx(whole[name], rel=1e-6), name
    for found, expected in zip(shared["auxiliary"], whole["auxiliary"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert shared["logits"] == pytest.approx(whole["logits"], rel=1e-5)
    assert len(shared["layers"]) == LAYERS + 2 and shared["layers"] == pytest.approx(whole["layers"], rel=1e-5)
    assert math.hypot(*shared["apart"].values()) <= 1e-4 * math.hypot(*whole["moved"].values())


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_shared_experts_train_as_whole_ones_do(case: str, answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        check_equal(answer[case]["2"], answer[case]["1"])


@pytest.mark.slow
def test_in_bf16_shared_experts_differ_less_than_another_micro_batch(answers: list[dict[str, Any]]) -> None:
    """DeepSpeed's own norm averages those of different experts."""
    case = answers[0]["bf16 summed in fp32, ZeRO 1"]
    whole, shared, other = (case[name] for name in ("1", "2", "another micro-batch"))
    assert shared["norm"][0] == pytest.approx(whole["norm"][0], rel=1e-3)
    for name in ("loss", "norm"):
        noise = max(abs(a - b) for a, b in zip(other[name], whole[name], strict=True))
        assert max(abs(a - b) for a, b in zip(shared[name], whole[name], strict=True)) <= noise
    assert sum(shared["apart"].values()) <= sum(other["apart"].values())


@pytest.mark.slow
def test_a_layer_shared_among_ranks_equals_the_whole_one_bit_for_bit(answers: list[dict[str, Any]]) -> None:
    """Outputs and all gradients; with ranks to which nothing is sent, ranks of one token, and ranks without any."""
    assert [answer["layer"] for answer in answers] == [[], []]


@pytest.mark.slow
def test_the_host_waits_once_a_layer_and_forward_for_the_lengths_of_messages(answers: list[dict[str, Any]]) -> None:
    """Two micro-batches on each rank, or one; the probe's forward is one more; recomputation is a second forward."""
    waits = {name: answers[0][name]["2"]["waits of a step"] for name in CASES}
    assert waits == {
        "a discarded step, ZeRO 1": LAYERS * (2 + 1),
        "recomputed, shared experts, ZeRO 2": LAYERS * (2 * 2 + 1),
        "selectively recomputed, padding, ZeRO 1": 1 * (2 * 1 + 1),
        "one rank gets every token, ZeRO 2": LAYERS * (1 + 1),
        "bf16 summed in fp32, ZeRO 1": LAYERS * (2 + 1),
    }
    assert {answers[0][name]["1"]["waits of a step"] for name in CASES} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if "padding" not in name])
def test_the_plan_knows_what_is_sent_to_experts_and_back(
    case: str, answers: list[dict[str, Any]], small: list[str], padded: list[str]
) -> None:
    """All rows that enter an exchange, of which half leave their rank when loads are balanced."""
    overrides = settings(small, padded, case, CASES[case])["overrides"]
    config = compose([*overrides, "engine.expert_parallel=2", "cluster=cpu", "cluster.devices=2"])
    # Two ranks, and a half of what each has.
    assert answers[0][case]["2"]["rows sent in a step"] == 4 * exchange_bytes(config)
    assert answers[0][case]["1"]["rows sent in a step"] == 0


@pytest.mark.slow
def test_a_rank_holds_its_part_of_the_experts_alone(answers: list[dict[str, Any]], small: list[str]) -> None:
    config = compose(small)
    experts = LAYERS * config.moe.experts * 3 * config.model.hidden_size * config.moe.expert_width
    case = answers[1]["a discarded step, ZeRO 1"]
    assert case["1"]["held"] - case["2"]["held"] == experts // 2


SCOPES = ("sequence", "previous_step", "micro_batch")


@pytest.mark.soak
@pytest.mark.parametrize("attention", ["kha_mlp", "mea", "kha_linear"])
def test_four_ranks_with_every_option_of_the_router(
    attention: str, small: list[str], padded: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    """EP 2 and 4 under ZeRO 1 and 2; each option of the router is met under both stages."""
    cases = {}
    for stage in (1, 2):
        for number, scope in enumerate(SCOPES):
            overrides = [
                *(f"attention={attention}", f"engine=zero{stage}", f"engine.micro_batch_size={1 + number % 2}"),
                *(f"moe.auxiliary_loss.scope={scope}", "moe.auxiliary_loss.weight=0.01", "moe.z_loss_weight=0.001"),
                f"engine.activation_checkpointing={('none', 'selective', 'full')[(number + stage) % 3]}",
                f"moe.bias_update={('rms', 'sign', 'sign_zero_mean')[number]}",
                f"moe.score={('sigmoid', 'softmax')[(number + stage) % 2]}",
                f"moe.renormalize={('true', 'false')[number % 2]}",
                f"moe.shared_experts={number % 2}",
                f"moe.routing_warmup_steps={3 * (number % 2)}",
                *(("moe.expert_groups=4", "moe.top_groups=2") if number == 2 else ()),
            ]
            case = {"overrides": ["data.global_batch_size=8", *overrides], "padded": number == 1, "discarded": number}
            name = f"attention {attention}, ZeRO {stage}, {scope}"
            cases[name] = settings(small, padded, name, case, sizes=[2, 4])
    answers = run_ranks(WORKER, 4, layer=small, cases=cases)
    for answer in answers:
        assert answer["layer"] == []
        for name in cases:
            for size in ("2", "4"):
                check_equal(answer[name][size], answer[name]["1"])


@pytest.mark.soak
def test_over_ten_steps_shared_experts_differ_no_more_than_another_micro_batch(
    small: list[str], padded: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    case = {"overrides": ["engine=zero2", "engine.micro_batch_size=1"], "micro": 2}
    answer = run_ranks(WORKER, 4, cases={"long": settings(small, padded, "long", case, steps=10, sizes=[2, 4])})[0]
    whole, other = answer["long"]["1"], answer["long"]["another micro-batch"]
    for size in ("2", "4"):
        shared = answer["long"][size]
        for name in ("loss", "norm"):
            noise = max(abs(a - b) for a, b in zip(other[name], whole[name], strict=True))
            far = max(abs(a - b) for a, b in zip(shared[name], whole[name], strict=True))
            print(f"EP {size}: {name} {far:.1e}, another micro-batch {noise:.1e}")
            assert far <= 2 * noise


def test_what_cannot_share_experts_is_refused_with_what_would(small: list[str]) -> None:
    for overrides, reason, allowed in (
        (["engine=zero3"], "only some ranks hold", ""),
        (["engine=zero1", "engine.compile=block"], "a compiled block cannot wait", ""),
        (["engine.expert_parallel=3"], "does not divide 8 experts", "1, 2, 4, 8"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            compose([*small, "engine.expert_parallel=2", *overrides])
        assert caught.value.field == "engine.expert_parallel" and (caught.value.allowed or "") == allowed
    config = compose([*small, "engine.expert_parallel=4", "engine.micro_batch_size=1"])
    validate_batch(config, 4)
    with pytest.raises(ConfigError, match="6 ranks do not divide") as caught:
        validate_batch(config, 6)
    assert str(caught.value.fix) == "engine.expert_parallel=2"
