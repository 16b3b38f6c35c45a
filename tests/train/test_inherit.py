"""A run that inherits another run's weights begins with its fp32 masters, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train import compose
from kha_train.checkpoint.reader import find_newest
from kha_train.distributed import World
from kha_train.train.run import train

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("inherit_worker.py")
MODEL = ["model.layers=1", "data.global_batch_size=4", "engine.micro_batch_size=2", "optim.lr=1e-4"]
NUMBERS = {
    "fp32": ("engine.precision=fp32",),
    "bf16": ("engine.precision=bf16",),
    "bf16 sums": ("engine.precision=bf16", "engine.grad_accum_dtype=bf16"),
}
GROUPS = ("engine=zero3", "engine.hpz_partition_size=2")


def every_case(small: list[str], size: int) -> dict[str, tuple[list[str], bool]]:
    """Name -> overrides, and whether the checkpoint is the run's own."""
    model = [*small, *MODEL]
    cases: dict[str, tuple[list[str], bool]] = {}
    for name, numbers in NUMBERS.items():
        for stage in (1, 2, 3):
            overrides = [*model, "attention=kha_mlp", f"engine=zero{stage}", "engine.micro_batch_size=2", *numbers]
            cases[f"zero{stage} {name}"] = (overrides, False)
    untied = [*model, "attention=kha_mlp", "model.tie_embeddings=false", *NUMBERS["bf16"]]
    cases["untied"] = (untied, False)
    if size == 2:
        cases["groups"] = ([*model, "attention=kha_mlp", *GROUPS, "engine.micro_batch_size=2", *NUMBERS["bf16"]], False)
        cases["groups resumed"] = ([*model, "attention=gqa", *GROUPS, "engine.micro_batch_size=2"], True)
    return cases


@pytest.fixture(scope="module")
def source(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps in bf16, whose masters are no bf16 numbers."""
    run_dir = tmp_path_factory.mktemp("source")
    train(compose([*small, *MODEL, "attention=gqa", "engine.precision=bf16", f"run.dir={run_dir}", "run.steps=3"]))
    checkpoint = find_newest(run_dir, World.single(), print)
    masters = torch.cat([checkpoint.read(name, "master") for name in checkpoint.names()])
    assert (masters != masters.bfloat16()).float().mean() > 0.9
    return run_dir


@pytest.mark.parametrize("size", [1, 2])
def test_masters_are_those_of_the_source_and_weights_their_rounding_in_every_stage_and_precision(
    size: int, source: Path, small: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    cases = every_case(small, size)
    for answers in run_ranks(WORKER, size, source=str(source), cases=cases):
        assert {name: answer["changed"] for name, answer in answers.items()} == dict.fromkeys(cases, 0)
        for name, answer in answers.items():
            ours, plain = answer["losses"]
            assert ours == pytest.approx(plain, rel=1e-6), name
            assert name == "groups resumed" or answer["moved"] == 0, name
            assert all(".interaction." in new or new == "head.weight" for new in answer["new"]), name


def test_the_first_checkpoint_of_a_bf16_run_that_learns_nothing_holds_the_masters_of_its_source(
    source: Path, small: list[str], tmp_path: Path
) -> None:
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "moe.bias_update_rate=0", "run.steps=1", "engine.precision=bf16"]
    train(compose([*small, *MODEL, "attention=gqa", *still, f"run.dir={tmp_path}", f"run.init_from={source}"]))
    before, after = (find_newest(run_dir, World.single(), print) for run_dir in (source, tmp_path))
    assert before.names() == after.names()
    for name in before.names():
        assert torch.equal(before.read(name, "master"), after.read(name, "master")), name
