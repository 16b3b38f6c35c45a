"""Compiled blocks give the losses of plain ones, under ZeRO 1 and 2 and with recomputation."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from kha_train import distributed
from kha_train.config.compose import compose
from kha_train.data.stream import open_stream
from kha_train.engine.deepspeed import Engine
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling

pytestmark = pytest.mark.slow

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
        Engine.leave_world()
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


class Probed(NamedTuple):
    """Losses, what probes found, and the graphs there were after each step."""

    losses: list[float]
    evidence: list[dict[str, Any]]
    graphs: list[int]


def probed(overrides: list[str], every: int = 1) -> Probed:
    """Six steps, probed in one of `every`, with validations of two rows and of a last, smaller batch of one."""
    config = compose([*overrides, "engine.device=cpu", "data.global_batch_size=4", "engine.micro_batch_size=2"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    world = distributed.start("cpu", 60)
    engine, found = Engine(config, world), Probed([], [], [])
    try:
        stream = open_stream(config)
        for step in range(6):
            batch, labels = next_batch(stream, world)
            ruling = Ruling(True, probe=step % every == 0)
            result = train_step(engine, batch, labels, 1e-2, lambda loss, norm, ruling=ruling: ruling)
            for rows in (2, 1):
                engine.evaluate(next(batch.micro_batches(rows)))
            found.losses.append(result.loss)
            found.evidence.extend([result.evidence] if result.evidence else [])
            found.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        engine.close()
        Engine.leave_world()
    return found


VARIANTS = {
    "kha": ["attention=kha_mlp"],
    "recomputed": ["attention=kha_linear", "engine.zero_stage=2", "engine.activation_checkpointing=full"],
    "dense layers": ["model.layers=3", "moe.dense_layers=1", "moe.dense_width=64"],
    "warm-up of many layers": ["model.layers=10", "model.hidden_size=32", "moe.routing_warmup_steps=50"],
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name == "kha" else pytest.mark.slow) for name in VARIANTS]
)
def test_probes_compile_nothing_and_find_what_they_find_in_plain_blocks(
    variant: str, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*small, *VARIANTS[variant]]
    plain = probed(settings)
    original = torch.nn.Module.compile
    # As traced, and run by torch: what is compiled does not depend on the code that is made of it.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        often, never = (probed([*settings, "engine.compile=block"], every) for every in (1, 99))
    assert plain.graphs == [0] * 6 and often.graphs[0] > 0
    assert often.graphs == never.graphs, "a probe was compiled"
    assert often.graphs[3:] == often.graphs[3:4] * 3, "graphs were made after the first sizes were seen"
    assert often.losses == plain.losses and len(often.evidence) == 6
    assert often.evidence == plain.evidence


@pytest.mark.slow
def test_compiled_code_gives_the_same_losses(small: list[str]) -> None:
    plain, _ = losses([*small, "attention=kha_mlp"])
    torch._dynamo.reset()
    compiled, _ = losses([*small, "attention=kha_mlp", "engine.compile=block"])
    assert compiled == pytest.approx(plain, abs=1e-4)
