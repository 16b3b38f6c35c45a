"""An interaction that is not trained (`attention.interaction.train=false`): its matrices are no parameters, and stay
what they were wherever a run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train.analysis.heads.matrices import learned_matrices
from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.config.compose import compose
from kha_train.decode.generate import load_run
from kha_train.distributed import World
from kha_train.errors import ConfigError, ResumeError
from kha_train.estimate.plan import make_plan
from kha_train.model.decoder import build_decoder
from kha_train.model.init import Orthogonal, initial_value
from kha_train.record import read_events, read_metrics
from kha_train.train.branch import Branch
from kha_train.train.run import train

SMALL = [
    "model.layers=1", "model.hidden_size=32", "model.head_dim=16", "moe.expert_width=32", "data.global_batch_size=4",
    "engine.micro_batch_size=2", "optim.lr=1e-2", "run.steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=9",
    "validation.every_steps=0", "validation.rows=2",
]  # fmt: skip
LINEAR = ["attention=kha_linear", "attention.interaction.init.kind=random_orthogonal"]
FROZEN = [*LINEAR, "attention.interaction.train=false"]
MAPS = {f"blocks.0.attention.interaction.maps.{projection}.weight": (16, 16) for projection in "qkv"}


def drawn() -> dict[str, torch.Tensor]:
    """The random orthogonal matrices of seed 0, by name."""
    return {name: initial_value(Orthogonal(), 0, name, shape) for name, shape in MAPS.items()}


def newest(run_dir: Path) -> Checkpoint:
    checkpoint = find_newest(run_dir, World.single(), print)
    assert checkpoint is not None
    return checkpoint


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def parent(trained: Callable[..., Path]) -> Path:
    return trained(*FROZEN)


def test_the_plan_has_no_gradient_and_no_optimiser_state_for_it() -> None:
    shape = ["model=small", "attention=kha_linear", "engine.precision=fp32", "engine.device=cpu"]
    alone, learning, frozen = (
        make_plan(compose([*shape, *extra])).to_dict()
        for extra in (
            ["interaction@attention.interaction=none"], [], ["attention.interaction.train=false"],
        )
    )  # fmt: skip
    numbers = learning["params"]["total"] - alone["params"]["total"]
    assert numbers == learning["params"]["by_component"]["interaction"] > 0
    assert frozen["params"]["total"] == alone["params"]["total"] and frozen["params"]["frozen"] == numbers
    assert alone["params"]["frozen"] == learning["params"]["frozen"] == 0
    terms, before = frozen["memory_per_rank"]["terms"], alone["memory_per_rank"]["terms"]
    assert terms["optimizer"] == before["optimizer"] and terms["gradients"] == before["gradients"]
    assert terms["parameters"] - before["parameters"] == 4 * numbers
    assert frozen["checkpoint"]["bytes"] - alone["checkpoint"]["bytes"] == 4 * numbers
    # Its forward, and the gradient of what it multiplies, but not its own: two of three products.
    forward = frozen["flops_per_token"]["by_component"]["interaction"]
    assert frozen["flops_per_token"]["training"] == alone["flops_per_token"]["training"] + 2 * forward
    assert learning["flops_per_token"]["training"] == alone["flops_per_token"]["training"] + 3 * forward


def test_a_decay_towards_the_identity_needs_matrices_that_are_trained() -> None:
    with pytest.raises(ConfigError, match="no matrices are trained") as refused:
        compose([*FROZEN, "optim.interaction_decay=identity"])
    assert refused.value.field == "optim.interaction_decay"


def test_it_starts_where_a_trained_one_does_and_computes_the_same_in_bf16() -> None:
    settings = ["model=tiny", *SMALL, *LINEAR, "attention.interaction.impl=eager"]
    learning, frozen = (
        build_decoder(compose([*settings, *extra])) for extra in ([], ["attention.interaction.train=false"])
    )
    buffers = dict(frozen.named_buffers())
    for name in MAPS:
        assert torch.equal(buffers[name], learning.get_parameter(name))
    assert list(learned_matrices(frozen)) == list(learned_matrices(learning)), "both are shown by kha analyze"
    tokens = torch.arange(32).view(1, 32)
    assert torch.equal(frozen(tokens).logits_BTV, learning(tokens).logits_BTV)
    frozen.to(torch.bfloat16), learning.to(torch.bfloat16)
    assert frozen.get_buffer(next(iter(MAPS))).dtype == torch.float32
    assert torch.equal(frozen(tokens).logits_BTV, learning(tokens).logits_BTV)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_bit_for_bit_with_the_matrices_it_began_with(
    stage: int, small: list[str], tmp_path: Path, curve: Callable[[Path], list[dict[str, Any]]]
) -> None:
    settings = [*small, *SMALL, *FROZEN, f"engine=zero{stage}", "engine.micro_batch_size=2", "engine.precision=bf16"]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    assert train(compose([*settings, f"run.dir={tmp_path}/whole"])).finished
    (tmp_path / "broken" / "STOP").write_text("")
    assert not train(compose([*settings, f"run.dir={tmp_path}/broken"])).finished
    assert train(compose([*settings, f"run.dir={tmp_path}/broken"])).finished
    assert curve(tmp_path / "whole") == curve(tmp_path / "broken")
    whole, broken = newest(tmp_path / "whole"), newest(tmp_path / "broken")
    assert not whole.names().keys() & MAPS.keys() and whole.names() == broken.names()
    for name in whole.names():
        assert all(torch.equal(whole.read(name, kind), broken.read(name, kind)) for kind in whole.kinds), name
    for checkpoint in (whole, broken):
        assert all(torch.equal(checkpoint.buffers()[name], value) for name, value in drawn().items())


@pytest.mark.slow
def test_it_trains_as_one_whose_learning_rate_and_decay_are_zero(trained: Callable[..., Path], parent: Path) -> None:
    """But for the norm of gradients, in which a parameter counts: without clipping."""
    unclipped = "optim.grad_clip=1e9"
    still = ["optim.interaction_lr_scale=0", "optim.interaction_decay=none"]
    assert losses(trained(*FROZEN, unclipped)) == pytest.approx(losses(trained(*LINEAR, *still, unclipped)), rel=1e-6)
    assert losses(parent) != losses(trained(*LINEAR))


@pytest.mark.slow
def test_decoding_and_a_branch_absorb_it(trained: Callable[..., Path], parent: Path, small: list[str]) -> None:
    model = load_run(parent, print)
    assert model.config.attention.interaction.name == "none"
    branch = trained("attention=gqa", f"run.branch_from={parent}", "run.steps=5")
    frozen = trained(*FROZEN, f"run.branch_from={parent}", "run.steps=5")
    assert losses(branch) == pytest.approx(losses(frozen), rel=1e-6)
    assert not newest(branch).buffers().keys() & MAPS.keys()
    (event,) = [event for event in read_events(branch) if event["kind"] == "branched"]
    assert len(event["absorbed"]) == 3


@pytest.mark.slow
def test_it_is_inserted_as_the_identity_alone(trained: Callable[..., Path], small: list[str]) -> None:
    plain = trained("attention=gqa")
    branch = [*small, *SMALL, "attention=kha_linear", "attention.interaction.train=false", "run.steps=5"]
    inserted = Branch(compose(branch), newest(plain), {})
    assert sorted(inserted.inserted) == sorted(MAPS)
    with pytest.raises(ResumeError, match="does not begin as the identity"):
        Branch(compose([*branch, LINEAR[1]]), newest(plain), {})
    with pytest.raises(ResumeError, match="attention.interaction.train"):
        Branch(compose([*small, *SMALL, *LINEAR, "run.steps=5"]), newest(trained(*FROZEN)), {})


@pytest.mark.slow
def test_weights_are_inherited_whether_they_were_trained_or_will_be(
    trained: Callable[..., Path], parent: Path, small: list[str]
) -> None:
    learned = trained(*LINEAR)
    still = ["run.steps=1", "optim.lr=1e-30", "optim.weight_decay=0"]
    frozen, thawed = (
        trained(*FROZEN, *still, f"run.init_from={learned}"),
        trained(*LINEAR, *still, f"run.init_from={parent}"),
    )
    for name, shape in MAPS.items():
        assert torch.equal(newest(frozen).buffers()[name], newest(learned).read(name, "master").view(shape))
        assert torch.equal(newest(thawed).read(name, "master").view(shape), drawn()[name])
    assert (newest(learned).read(next(iter(MAPS)), "master") - drawn()[next(iter(MAPS))].flatten()).abs().max() > 1e-4
    (event,) = [event for event in read_events(frozen) if event["kind"] == "weights_inherited"]
    assert event["new"] == event["left_out"] == []
    for run, options in ((parent, LINEAR), (learned, FROZEN)):
        allowed = ["resume.allow_changes=[attention.interaction.train]", "run.steps=4", f"run.dir={run}"]
        with pytest.raises(ResumeError, match="holds other parameters"):
            train(compose([*small, *SMALL, *options, *allowed]))
