"""Statistics of layers: right under every stage and world size, exact under recomputation, and without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train import build_decoder, compose, distributed, open_stream
from kha_train.distributed import World
from kha_train.engine import plain as plain_engine
from kha_train.engine.deepspeed import Engine
from kha_train.model.host import inputs_of
from kha_train.optim import parameter_groups
from kha_train.record import declared_in, read_metrics, read_run
from kha_train.train.run import train
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling

WORKER = Path(__file__).with_name("layer_worker.py")
STEPS = 2
ROWS = 8
TRAINING = [
    "engine.device=cpu", "attention=kha_mlp", "optim.lr=3e-3", "optim.grad_clip=0.05", "engine.micro_batch_size=2",
    f"data.global_batch_size={ROWS}", "telemetry.layer_statistics_every=1",
]  # fmt: skip
STATISTICS = ("layer/grad_norm", "layer/update_norm", "layer/activation_rms")


@pytest.fixture(scope="module")
def cases(small: list[str]) -> dict[str, tuple[list[str], int]]:
    """Name -> overrides and steps."""
    base = [*small, *TRAINING]
    found = {f"zero{stage}": ([*base, f"engine.zero_stage={stage}"], STEPS) for stage in (1, 2, 3)}
    recomputed = [*base, "engine.zero_stage=3", "engine.activation_checkpointing=full"]
    bf16 = [*base, "engine.zero_stage=1", "engine.precision=bf16"]
    return {**found, "recomputed": (recomputed, STEPS), "bf16": (bf16, 1)}


@pytest.fixture(scope="module")
def two_ranks(cases: dict[str, Any], run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """What each of two ranks answered."""
    return run_ranks(WORKER, 2, cases=cases)


@pytest.fixture(scope="module")
def plain(cases: dict[str, Any]) -> list[dict[str, list[float]]]:
    """The statistics of a loop that knows no engine: the global batch at once, torch's AdamW and clipping, a hook on
    every block."""
    config = compose(cases["zero1"][0])
    decoder, optim = build_decoder(config), config.optim
    adamw = torch.optim.AdamW(
        parameter_groups(decoder.named_parameters(), optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps
    )
    outputs: list[torch.Tensor] = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, __, returned: outputs.append(returned[0].detach()))
    answers = []
    for _, batch in zip(range(STEPS), open_stream(config), strict=False):
        outputs.clear()
        output = decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        adamw.zero_grad()
        (output.loss_sum / batch.label_count).backward()
        layers = [list(block.parameters()) for block in decoder.blocks]
        gradients = [norm_of([parameter.grad for parameter in layer]) for layer in layers]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), optim.grad_clip)
        before = [[parameter.detach().clone() for parameter in layer] for layer in layers]
        adamw.step()
        decoder.finish_step(output.load_LE)
        updates = [
            norm_of([now.detach() - then for now, then in zip(layer, old, strict=True)])
            for layer, old in zip(layers, before, strict=True)
        ]
        activations = [x_BTD.double().square().mean().sqrt().item() for x_BTD in outputs]
        answers.append(dict(zip(STATISTICS, (gradients, updates, activations), strict=True)))
    return answers


@pytest.mark.parametrize("stage", [1, 3])
def test_an_observed_step_computes_the_same_bits(stage: int, cases: dict[str, Any]) -> None:
    config = compose([*cases["zero1"][0], f"engine.zero_stage={stage}"])
    world = distributed.start("cpu", 60)
    found: list[dict[str, torch.Tensor]] = []
    for observed in (False, True):
        engine, stream = Engine(config, world), open_stream(config)
        results = [
            train_step(engine, *next_batch(stream, world), config.optim.lr, observed=observed) for _ in range(STEPS)
        ]
        assert all(bool(result.values) == observed for result in results)
        state = {
            f"{part.name} {kind}": view.clone() for part in engine.fragments() for kind, view in part.views.items()
        }
        found.append({**state, "losses": torch.tensor([result.loss for result in results])})
        engine.close()
    Engine.leave_world()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_skipped_step_has_the_norms_of_its_gradient_and_no_update(cases: dict[str, Any]) -> None:
    engine = plain_engine.Engine(compose(cases["zero1"][0]), World.single())
    batch, labels = next_batch(open_stream(engine.config), engine.world)
    result = train_step(engine, batch, labels, 1e-3, lambda loss, norm: Ruling(False), observed=True)
    assert not result.applied and "layer/grad_norm" in result.values and "layer/update_norm" not in result.values


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_activations_are_those_of_tokens_in_dense_layers_and_layers_with_experts(
    recomputed: str, padded: list[str]
) -> None:
    mixed = ["moe.dense_layers=1", "moe.dense_width=64", "model.layers=3", "telemetry.layer_statistics_every=1"]
    config = compose([*padded, *mixed, f"engine.activation_checkpointing={recomputed}"])
    decoder, batch, outputs = build_decoder(config), next(open_stream(config)), []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, __, returned: outputs.append(returned[0].detach()))
    decoder.observed = True
    output = decoder(*inputs_of(batch, torch.device("cpu")))
    output.loss_sum.backward()
    assert batch.real_R is not None and len(batch.real_R) < batch.tokens_BT.numel()
    kept = [x_BTD.flatten(0, 1)[batch.real_R].double().square() for x_BTD in outputs[:3]]
    found = output.values["layer/activation_rms"]
    assert found[:, 1].tolist() == [x_RD.numel() for x_RD in kept]
    assert found[:, 0].tolist() == pytest.approx([x_RD.sum().item() for x_RD in kept], rel=1e-5)
    decoder.observed = False
    assert decoder(*inputs_of(batch, torch.device("cpu"))).values == {}


def test_the_record_has_them_every_so_many_steps(cases: dict[str, Any], tmp_path: Path) -> None:
    often = ["telemetry.layer_statistics_every=2", "run.steps=4", f"run.dir={tmp_path}"]
    train(compose([*cases["zero1"][0], *often]), engine_class=plain_engine.Engine)
    lines, declared = read_metrics(tmp_path), declared_in(read_run(tmp_path))
    assert [{*STATISTICS} <= {*line} for line in lines] == [False, True, False, True]
    for line in lines:
        assert line.keys() <= declared.keys()
    assert not declared["layer/grad_norm_by_layer"].mirrored and declared["layer/grad_norm"].mirrored


def norm_of(tensors: list[Any]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_every_stage_on_two_ranks_gives_the_norms_of_a_plain_pytorch_loop(
    stage: str, two_ranks: list[dict[str, Any]], plain: list[dict[str, list[float]]]
) -> None:
    assert two_ranks[0][stage] == two_ranks[1][stage]
    for found, expected in zip(two_ranks[0][stage], plain, strict=True):
        for name in STATISTICS:
            assert found[f"{name}_by_layer"] == pytest.approx(expected[name], rel=1e-4)
            assert found[name] == max(found[f"{name}_by_layer"])
        assert len({round(value, 5) for value in found["layer/grad_norm_by_layer"]}) == 2, "layers differ"
        assert found["whole norm"] > math.hypot(*found["layer/grad_norm_by_layer"])


@pytest.mark.slow
def test_recomputing_activations_changes_no_statistic(two_ranks: list[dict[str, Any]]) -> None:
    for found, expected in zip(two_ranks[0]["recomputed"], two_ranks[0]["zero3"], strict=True):
        assert found.keys() == expected.keys()
        assert all(found[key] == pytest.approx(expected[key], rel=1e-5) for key in expected)


@pytest.mark.slow
def test_bf16_with_gradients_in_fp32_gives_nearly_the_norms_of_fp32(two_ranks: list[dict[str, Any]]) -> None:
    (found,), expected = two_ranks[0]["bf16"], two_ranks[0]["zero1"][0]
    for name in STATISTICS:
        assert found[f"{name}_by_layer"] == pytest.approx(expected[f"{name}_by_layer"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero1", "recomputed"])
def test_values_of_micro_batches_and_ranks_are_combined_as_declared(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """The toy reports sample numbers: two ranks of two micro-batches of two rows see 0 .. 7, then 8 .. 15."""
    for step, found in enumerate(two_ranks[0][case]):
        seen = list(range(step * ROWS, (step + 1) * ROWS))
        squares = sum(number**2 for number in seen)
        expected = {"sum": sum(seen), "mean": sum(seen) / ROWS, "rms": math.sqrt(squares / ROWS)}
        expected |= {"norm": math.sqrt(squares), "max": max(seen), "min": min(seen), "last": seen[ROWS // 2 - 1]}
        for kind, value in expected.items():
            assert found[f"toy/{kind}_by_layer"] == pytest.approx([value] * 2, rel=1e-12), kind
