"""The engine against plain PyTorch, and against itself under other stages, world sizes and attention variants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train import build_decoder, compose, open_stream
from kha_train.optim import parameter_groups

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("parity_worker.py")
STEPS = 10
TRAINING = ["attention=kha_mlp", "optim.lr=3e-3", "optim.grad_clip=0.5", "engine.micro_batch_size=2"]
STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def cases(small: list[str]) -> dict[str, tuple[list[str], int]]:
    """Name -> overrides and steps."""
    trained = {stage: ([*small, *TRAINING, f"engine={stage}", "engine.micro_batch_size=2"], STEPS) for stage in STAGES}
    built = {name: ([*small, f"attention={name}"], 0) for name in ("gqa", "kha_linear")}
    checkpointed = [*small, *TRAINING, "engine=zero3", "engine.activation_checkpointing=full"]
    bf16 = [*small, *TRAINING, "engine=zero3", "engine.precision=bf16"]
    return {**trained, **built, "checkpointed": (checkpointed, 3), "bf16 zero3": (bf16, 2)}


@pytest.fixture(scope="module")
def two_ranks(cases: dict[str, Any], run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What each of two ranks answered."""
    return run_ranks(WORKER, 2, cases=cases)


@pytest.fixture(scope="module")
def one_rank(cases: dict[str, Any], run_ranks: Callable[..., list[Any]]) -> dict[str, Any]:
    """What a single process answered."""
    return run_ranks(WORKER, 1, cases=cases)[0]


@pytest.fixture(scope="module")
def plain(cases: dict[str, Any]) -> dict[str, list[float]]:
    """Losses and norms of a loop that knows no engine: the whole global batch at once, torch's AdamW and clipping."""
    config = compose(cases["zero1"][0])
    decoder, optim = build_decoder(config), config.optim
    groups = parameter_groups(decoder.named_parameters(), optim.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    curve: dict[str, list[float]] = {"loss": [], "norm": []}
    for _, batch in zip(range(STEPS), open_stream(config), strict=False):
        output = decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        loss = output.loss_sum / batch.label_count
        adamw.zero_grad()
        loss.backward()
        curve["norm"].append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), optim.grad_clip).item())
        adamw.step()
        decoder.finish_step(output.load_LE)
        curve["loss"].append(loss.item())
    return curve


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_on_two_ranks_agrees_with_a_plain_pytorch_loop(
    stage: str, two_ranks: list[dict[str, Any]], plain: dict[str, list[float]]
) -> None:
    first, second = two_ranks[0][stage], two_ranks[1][stage]
    assert first["labels"] != second["labels"], "the ranks hold equally many labels: the test would show little"
    assert first["loss"] == second["loss"]
    assert first["loss"] == pytest.approx(plain["loss"], abs=2e-6)
    assert first["norm"] == pytest.approx(plain["norm"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_one_and_two_ranks_see_the_same_samples_and_losses(
    stage: str, one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    together = [a + b for a, b in zip(two_ranks[0][stage]["samples"], two_ranks[1][stage]["samples"], strict=True)]
    assert together == one_rank[stage]["samples"]
    assert two_ranks[0][stage]["loss"] == pytest.approx(one_rank[stage]["loss"], abs=2e-6)


def test_initial_weights_do_not_depend_on_stage_or_world_size(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    expected = one_rank["zero1"]["initial"]
    assert len(expected) > 10
    for answers in (one_rank, *two_ranks):
        for stage in STAGES:
            assert answers[stage]["initial"] == expected


def test_attention_variants_start_from_the_same_shared_weights(one_rank: dict[str, Any]) -> None:
    baseline = one_rank["gqa"]["initial"]
    for variant in ("zero1", "kha_linear"):
        initial = one_rank[variant]["initial"]
        assert baseline.items() <= initial.items()
        assert len(initial) > len(baseline)


def test_recomputing_activations_changes_no_loss(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["checkpointed"]["loss"] == pytest.approx(two_ranks[0]["zero3"]["loss"][:3], abs=2e-6)


def test_selection_biases_stay_fp32_while_weights_are_bf16(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["bf16 zero3"]["parameter_dtypes"] == ["torch.bfloat16"]
    assert two_ranks[0]["bf16 zero3"]["buffer_dtypes"] == ["torch.float32"]
