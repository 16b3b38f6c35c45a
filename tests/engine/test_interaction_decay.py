"""Decay and learning rate of the matrices through which heads exchange information, under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train import build_decoder, compose, open_stream
from kha_train.checkpoint.reader import find_newest
from kha_train.distributed import World
from kha_train.optim import learning_rate
from kha_train.train.run import train

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("decay_worker.py")
STEPS = 3
RANDOM = "attention.interaction.init.kind=random"
TRAINING = ["model.layers=1", "optim.lr=3e-3", "optim.weight_decay=2.0", "engine.micro_batch_size=2"]
IDENTITY = ("optim.interaction_decay=identity", "optim.interaction_lr_scale=0.5")
WAYS = {
    "kha_mlp identity": ("attention=kha_mlp", RANDOM, *IDENTITY),
    "mea identity": ("attention=mea", RANDOM, *IDENTITY),
    "talking_heads none": ("attention=talking_heads", "optim.interaction_decay=none"),
    "kha_linear zero": ("attention=kha_linear", RANDOM, "optim.interaction_lr_scale=3.0"),
}
NUMBERS = {"fp32": (), "bf16": ("engine.precision=bf16", "engine.grad_accum_dtype=bf16")}
EVERYWHERE = [f"kha_mlp identity, zero{stage}, {numbers}" for stage, numbers in product((1, 2, 3), NUMBERS)]
ONCE = ["mea identity, zero2, fp32", "talking_heads none, zero1, bf16", "kha_linear zero, zero3, fp32"]
SPLIT = ["mea identity, zero3, bf16", "talking_heads none, zero2, fp32", "kha_linear zero, zero1, bf16"]
"""The same again under other stages, so that two ranks share matrices of 4 x 4 too."""


def overrides_of(case: str, small: list[str]) -> list[str]:
    """The command line of a case."""
    way, stage, numbers = case.split(", ")
    return [*small, *TRAINING, *WAYS[way], f"engine={stage}", "engine.micro_batch_size=2", *NUMBERS[numbers]]


@pytest.fixture(scope="module")
def answers(small: list[str], run_ranks: Callable[..., list[Any]]) -> dict[int, list[dict[str, Any]]]:
    """What every rank of one and of two answered."""
    chosen = {1: [*EVERYWHERE, *ONCE], 2: [*EVERYWHERE, *SPLIT]}
    return {
        size: run_ranks(WORKER, size, cases={case: overrides_of(case, small) for case in cases})
        for size, cases in chosen.items()
    }


def test_every_step_is_adamws_formula_with_the_decay_and_rate_that_are_asked_for(answers) -> None:
    for size, ranks in answers.items():
        for case in ranks[0]:
            for answer in (rank[case] for rank in ranks):
                assert answer["error"] < 1e-6, (size, case)
            assert max(rank[case]["moved"] for rank in ranks) > 1e-4, (size, case)
            assert any(rank[case]["seen"] for rank in ranks), (size, case)


def test_a_refused_step_leaves_no_trace_and_norms_stay_those_of_layers(answers) -> None:
    for ranks in answers.values():
        for answer in (answer for rank in ranks for answer in rank.values()):
            assert answer["left by a refused step"] == []
            names, together, whole = answer["norms by layer"]
            assert names == ["blocks.0", "outside layers", "vectors"]
            assert together == pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("case", ["kha_mlp identity", "mea identity", "talking_heads none", "kha_linear zero"])
def test_losses_are_those_of_a_plain_loop_that_decays_by_hand(case: str, small: list[str], answers) -> None:
    """torch's AdamW without decay on the whole batch; before its step p <- p - lr decay (p - aim), written out."""
    config = compose([*small, *TRAINING, *WAYS[case]])
    decoder, optim = build_decoder(config), config.optim
    named = dict(decoder.named_parameters())
    mixes = [name for name in named if ".interaction.maps." in name or ".compose." in name or "_mix." in name]
    assert mixes
    aims = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    if optim.interaction_decay == "identity":
        aims |= {name: torch.eye(len(named[name])) for name in mixes if ".gate." not in name}
    groups = [
        {
            "params": [parameter for name, parameter in named.items() if name in mixes],
            "scale": optim.interaction_lr_scale,
        },
        {"params": [parameter for name, parameter in named.items() if name not in mixes], "scale": 1.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    losses = []
    for step, batch in zip(range(1, STEPS + 1), open_stream(config), strict=False):
        output = decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        losses.append((output.loss_sum / batch.label_count).item())
        adamw.zero_grad()
        (output.loss_sum / batch.label_count).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), optim.grad_clip)
        lr = optim.lr * step / STEPS
        for group in adamw.param_groups:
            group["lr"] = lr * group["scale"]
        with torch.no_grad():
            for name, parameter in named.items():
                free = parameter.dim() < 2 or (name in mixes and optim.interaction_decay == "none")
                rate = (
                    lr * (optim.interaction_lr_scale if name in mixes else 1.0) * (0.0 if free else optim.weight_decay)
                )
                parameter.sub_(rate * (parameter - aims[name]))
        adamw.step()
        decoder.finish_step(output.load_LE)
    found = [
        rank[name]["loss"]
        for ranks in answers.values()
        for rank in ranks
        for name in rank
        if case in name and "fp32" in name
    ]
    assert found
    for curve in found:
        assert curve == pytest.approx(losses, abs=3e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_that_decays_to_the_identity_goes_on_bit_for_bit_and_records_the_base_rate(
    stage: int, small: list[str], tmp_path: Path, curve: Callable[[Path], list[dict[str, Any]]]
) -> None:
    settings = [*small, *TRAINING, *WAYS["kha_mlp identity"], f"engine=zero{stage}", "engine.micro_batch_size=2"]
    settings += ["run.steps=4", "run.name=one", "engine.precision=bf16"]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    assert train(compose([*settings, f"run.dir={tmp_path}/whole"])).finished
    (tmp_path / "broken" / "STOP").write_text("")
    assert not train(compose([*settings, f"run.dir={tmp_path}/broken"])).finished
    assert train(compose([*settings, f"run.dir={tmp_path}/broken"])).finished
    curves = [curve(tmp_path / name) for name in ("whole", "broken")]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    optim = compose(settings).optim
    assert [line["train/lr"] for line in curves[0]] == [learning_rate(optim, step, 4) for step in (1, 2, 3, 4)]
    whole, broken = (find_newest(tmp_path / name, World.single(), print) for name in ("whole", "broken"))
    for name, kind in product(whole.names(), ("master", "exp_avg", "exp_avg_sq")):
        assert torch.equal(whole.read(name, kind), broken.read(name, kind)), name
