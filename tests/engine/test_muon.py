"""Muon under every ZeRO stage: one and two ranks compute the same, whatever is cut; saved and resumed in any layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kha_train import build_decoder, open_stream
from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.reader import find_newest, verify
from kha_train.config.compose import compose
from kha_train.distributed import World
from kha_train.engine import plain
from kha_train.errors import ResumeError
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import linear_maps
from kha_train.train.run import train
from kha_train.train.step import next_batch, train_step

pytestmark = pytest.mark.slow

STEPS = 4
"""Those of the worker, before the one that it first refuses."""
WORKER = Path(__file__).with_name("muon_worker.py")
TRAINING = ["attention=kha_mlp", "optim=muon", "optim.lr=3e-3", "optim.grad_clip=0.5", "engine.micro_batch_size=2"]
BF16 = ("engine.precision=bf16", "engine.moment_dtype=bf16")
CASES = {
    **{f"zero{stage}": (f"engine.zero_stage={stage}",) for stage in (1, 2, 3)},
    **{f"zero{stage} bf16": (f"engine.zero_stage={stage}", *BF16) for stage in (1, 2)},
}
EXPERT_PARALLEL = {
    f"zero{stage} experts": (f"engine.zero_stage={stage}", "engine.expert_parallel=2") for stage in (1, 2)
}


@pytest.fixture(scope="module")
def answers(small: list[str], run_ranks: Callable[..., list[Any]]) -> dict[int, list[dict[str, Any]]]:
    """What every rank of one and of two answered."""
    cases = {name: [*small, *TRAINING, *settings] for name, settings in {**CASES, **EXPERT_PARALLEL}.items()}
    alone = {name: cases[name] for name in CASES}
    return {1: run_ranks(WORKER, 1, cases=alone), 2: run_ranks(WORKER, 2, cases=cases)}


def whole(ranks: list[dict[str, Any]], case: str, kind: str = "master") -> dict[str, Tensor]:
    """Every parameter's numbers of one kind, put together from all ranks."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in ranks:
        for (name, of, start), values in torch.load(rank[case]["state"])[case].items():
            if of == kind:
                parts.setdefault(name, []).append((start, values))
    return {
        name: torch.cat([values for _, values in sorted(held, key=lambda part: part[0])])
        for name, held in parts.items()
    }


def plain_loop(small: list[str]) -> dict[str, Tensor]:
    """Every parameter after the steps that the ranks took, by the engine without DeepSpeed, groups or shares."""
    config, world = compose([*small, *TRAINING]), World.single()
    engine, stream = plain.Engine(config, world), open_stream(config)
    for _ in range(STEPS + 1):
        train_step(engine, *next_batch(stream, world), config.optim.lr)
    return {fragment.name: fragment.views["master"].clone() for fragment in engine.fragments()}


def test_one_and_two_ranks_and_every_stage_end_with_the_same_weights(answers: Any, small: list[str]) -> None:
    decoder = build_decoder(compose([*small, *TRAINING]))
    start, maps = {name: value.detach().flatten() for name, value in decoder.named_parameters()}, linear_maps(decoder)
    found = {(size, stage): whole(answers[size], f"zero{stage}") for size in answers for stage in (1, 2, 3)}
    apart = {
        pair: max(float((found[pair[0]][name] - found[pair[1]][name]).abs().max()) for name in start)
        for pair in (((1, 1), (2, 1)), ((1, 2), (2, 2)), ((1, 3), (2, 3)), ((1, 1), (1, 2)))
    }
    assert max(apart.values()) < 1e-6, apart
    expected, shared = plain_loop(small), {name: whole(answers[2], name) for name in EXPERT_PARALLEL}
    relative = {
        key: max(float((weights[n] - expected[n]).norm() / (expected[n] - start[n]).norm()) for n in start)
        for key, weights in {**found, **shared}.items()
    }
    assert max(relative.values()) < 1e-5, relative
    for name, weights in shared.items():
        assert weights.keys() == start.keys()
        assert max(float((weights[n] - found[1, 1][n]).abs().max()) for n in start) < 1e-6, name
        assert answers[2][0][name]["loss"] == pytest.approx(answers[1][0]["zero1"]["loss"], abs=1e-6)
    for (size, stage), weights in found.items():
        assert weights.keys() == start.keys()
        assert whole(answers[size], f"zero{stage}", "momentum").keys() == maps.keys()
        assert whole(answers[size], f"zero{stage}", "exp_avg_sq").keys() == start.keys() - maps.keys()
        assert answers[size][0][f"zero{stage}"]["loss"] == pytest.approx(answers[1][0]["zero1"]["loss"], abs=1e-6)
    for name in ("zero1 bf16", "zero2 bf16"):
        assert answers[2][0][name]["loss"] == pytest.approx(answers[1][0][name]["loss"], abs=3e-3)


def test_the_norm_is_that_of_the_gradient_and_a_refused_step_leaves_no_trace(answers: Any) -> None:
    for ranks in answers.values():
        for answer in (answer for rank in ranks for answer in rank.values()):
            assert answer["left by a refused step"] == []
            assert min(answer["norm"]) > 0.5, "nothing was clipped"
            names, together, norm = answer["norms"]
            assert names == ["blocks.0", "blocks.1", "outside layers", "vectors"]
            assert together == pytest.approx(norm, rel=1e-2)
    for size in answers:
        for stage in (1, 2, 3):
            assert answers[size][0][f"zero{stage}"]["norm"] == pytest.approx(answers[1][0]["zero1"]["norm"], rel=1e-5)
            assert answers[size][0][f"zero{stage}"]["updates"] == pytest.approx(
                answers[1][0]["zero1"]["updates"], rel=1e-4
            )


def test_a_run_resumes_bit_for_bit_and_is_compared_and_verified(small: list[str], tmp_path: Path) -> None:
    settings = [*small, *TRAINING, "run.steps=4", "run.name=one", "checkpoint.every_steps=2"]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    assert train(compose([*settings, f"run.dir={tmp_path}/whole"])).finished
    assert not train(compose([*settings, f"run.dir={tmp_path}/broken"]), until=2).finished
    early = find_newest(tmp_path / "broken", World.single(), print)
    assert train(compose([*settings, f"run.dir={tmp_path}/broken"])).finished
    ends = [find_newest(tmp_path / name, World.single(), print) for name in ("whole", "broken")]
    assert not compare(*ends).tensors
    verify(ends[0].path)
    maps = linear_maps(lay_out_decoder(compose(settings)))
    for name in ends[0].names():
        assert ends[0].kinds_of(name) == (
            ("master", "momentum") if name in maps else ("master", "exp_avg", "exp_avg_sq")
        )
    moved = compare(early, ends[0])
    assert {name for name in moved.tensors if name.endswith(" momentum")} == {f"{name} momentum" for name in maps}

    with pytest.raises(ResumeError, match=r"optim\.name +'muon' -> 'adamw'"):
        train(compose([*small, "attention=kha_mlp", f"run.dir={tmp_path}/whole", "run.steps=4"]))
    with pytest.raises(ResumeError, match="states of another optimiser") as caught:
        train(compose([*settings, "optim=adamw", f"run.dir={tmp_path}/whole", "resume.allow_changes=[optim]"]))
    assert caught.value.field == "optim.name" and "exp_avg_sq, momentum" in str(caught.value)
    fresh = compose([*settings, f"run.dir={tmp_path}/fresh", "optim=adamw", f"run.init_from={ends[0].path}"])
    assert train(fresh, engine_class=plain.Engine).finished
    assert math.isfinite(find_newest(tmp_path / "fresh", World.single(), print).read("norm.weight", "exp_avg").sum())


@pytest.mark.parametrize(("ranks", "zero", "shared"), [(2, 3, 1), (2, 1, 1), (2, 2, 2)])
def test_every_layout_takes_over_the_same_state_bit_for_bit(
    ranks: int, zero: int, shared: int, small: list[str], run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    settings = [*small, *TRAINING, "run.steps=2"]
    train(compose([*settings, f"run.dir={tmp_path}/source"]))
    worker = Path(__file__).parents[1] / "faults" / "elastic_worker.py"
    overrides = [*settings, f"engine.zero_stage={zero}", f"engine.expert_parallel={shared}", "run.dir=unused"]
    run_ranks(worker, ranks, source=f"{tmp_path}/source", target=f"{tmp_path}/target", overrides=overrides)
    first, second = (find_newest(tmp_path / name, World.single(), print) for name in ("source", "target"))
    assert first.names() == second.names()
    for name in first.names():
        assert first.kinds_of(name) == second.kinds_of(name)
        assert all(torch.equal(first.read(name, kind), second.read(name, kind)) for kind in first.kinds_of(name)), name
