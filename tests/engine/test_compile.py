"""Compiled blocks give the losses of plain ones, under ZeRO 1 and 2 and with recomputation."""

from __future__ import annotations

import itertools

import pytest
import torch

from kha_train import distributed
from kha_train.config.compose import compose
from kha_train.data.stream import open_stream
from kha_train.engine.deepspeed import Engine, leave_world
from kha_train.train.step import next_batch, train_step

STEPS = 3


def losses(overrides: list[str]) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of some steps, of rows cut into ever other documents, and the last loads of the experts."""
    config = compose([*overrides, "engine.device=cpu", "data.global_batch_size=4", "engine.micro_batch_size=2"])
    world = distributed.start("cpu", 60)
    engine = Engine(config, world)
    try:
        stream = open_stream(config)
        results = [train_step(engine, *next_batch(stream, world), 1e-2) for _ in range(STEPS)]
    finally:
        engine.close()
        leave_world()
    return [result.loss for result in results], [result.load_LE for result in results]


@pytest.mark.parametrize(("attention", "stage", "recomputed"), [("kha_linear", 1, "none"), ("kha_mlp", 2, "full")])
def test_tracing_blocks_changes_nothing(
    attention: str, stage: int, recomputed: str, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the compiler but its code generation: what it traces, and the gradients it derives."""
    settings = [*small, f"attention={attention}", f"engine.zero_stage={stage}"]
    settings += [f"engine.activation_checkpointing={recomputed}"]
    plain, loads = losses(settings)
    original = torch.nn.Module.compile
    asked: list[object] = []

    def traced(module: torch.nn.Module) -> None:
        asked.append(module)
        original(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.reset()
    compiled, compiled_loads = losses([*settings, "engine.compile=block"])
    assert len(asked) == 2
    assert compiled == pytest.approx(plain, abs=1e-5)
    for one, other in itertools.islice(zip(loads, compiled_loads, strict=True), 1):
        assert torch.equal(one, other)


def test_a_compiled_block_takes_ever_other_numbers_of_tokens(
    padded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*padded, "moe.auxiliary_loss.weight=0.1", "moe.z_loss_weight=0.01"]
    plain, _ = losses(settings)
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend="aot_eager"))
    torch._dynamo.reset()
    compiled, _ = losses([*settings, "engine.compile=block"])
    assert compiled == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
def test_compiled_code_gives_the_same_losses(small: list[str]) -> None:
    plain, _ = losses([*small, "attention=kha_mlp"])
    torch._dynamo.reset()
    compiled, _ = losses([*small, "attention=kha_mlp", "engine.compile=block"])
    assert compiled == pytest.approx(plain, abs=1e-4)
