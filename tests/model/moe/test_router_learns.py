"""The language model's loss reaches the router of every accepted configuration, according to autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.config.compose import compose, dump, load
from kha_train.config.schema import AuxiliaryLossSection, RunConfig
from kha_train.config.validate import validate
from kha_train.errors import ConfigError
from kha_train.model.decoder import build_decoder
from kha_train.model.device import resolve_on
from kha_train.model.moe.experts import announce_experts

THE_RULE = ("moe.renormalize", "moe.routed_scaling")
SMALL = [
    "model.layers=2",
    "model.hidden_size=32",
    "model.vocab_size=64",
    "model.seq_len=16",
    "model.head_dim=8",
    "moe.expert_width=8",
    "moe.backend=loop",
    "moe.dense_width=16",
]


def language_model_gradients(config: RunConfig) -> list[float]:
    """The norm of the gradient of each router's weight from the cross-entropy alone, in fp64, at the second step."""
    decoder = build_decoder(config).double()
    for router in decoder.routers():
        router.finish_step(torch.ones(config.moe.experts))
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    decoder(tokens, tokens.roll(-1)).loss_sum.backward()
    return [router.weight.grad.norm().item() for router in decoder.routers()]


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a mixture that are in bounds and fit each other; whether its router can learn is the question."""
    experts = draw(st.integers(1, 8))
    groups = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
    top_groups = draw(st.integers(1, groups))
    return {
        "experts": experts,
        "expert_groups": groups,
        "top_groups": top_groups,
        "top_k": draw(st.integers(1, experts // groups * top_groups)),
        "score": draw(st.sampled_from(["sigmoid", "softmax"])),
        "renormalize": draw(st.booleans()),
        "routed_scaling": draw(st.sampled_from([2.5, 1.0, -1.0, 1e-3, 0.0, -0.0, 1e-320])),
        "shared_experts": draw(st.integers(0, 1)),
        "dense_layers": draw(st.integers(0, 1)),
        "routing_warmup_steps": draw(st.sampled_from([0, 1, 5])),
        "z_loss_weight": draw(st.sampled_from([0.0, 0.1])),
        "auxiliary_loss": AuxiliaryLossSection(weight=draw(st.sampled_from([0.0, 0.1]))),
    }


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_what_is_refused_is_exactly_what_leaves_a_router_of_several_experts_without_a_gradient(
    moe: dict[str, Any],
) -> None:
    config = compose(SMALL)
    config = replace(config, moe=replace(config.moe, **moe))
    try:
        validate(config)
    except ConfigError as error:
        assert error.field in THE_RULE
        assert max(language_model_gradients(config)) < 1e-12
    else:
        assert moe["experts"] == 1 or min(language_model_gradients(config)) > 1e-9


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.top_k=1"],
        ["moe.top_k=1", "moe.score=softmax"],
        ["moe.top_k=1", "moe.z_loss_weight=0.1", "moe.auxiliary_loss.weight=0.1", "moe.shared_experts=1"],
        ["moe.top_k=1", "moe.expert_groups=8"],
        ["moe.top_k=1", "moe.expert_groups=4", "moe.top_groups=2"],
        ["moe.experts=2", "moe.top_k=1"],
        ["moe.routed_scaling=0"],
        ["moe.routed_scaling=1e-60"],
        ["model.init_std=0"],
    ],
    ids=" ".join,
)
def test_every_way_to_a_router_without_a_gradient_is_refused_and_what_is_proposed_is_accepted(
    overrides: list[str],
) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["model=tiny", *overrides])
    error = refused.value
    assert error.exit_code == 2 and error.field in (*THE_RULE, "model.init_std") and error.allowed
    for fix in error.fix.split(" or ") if error.fix else ["model.init_std=0.02"]:
        assert min(language_model_gradients(compose([*SMALL, "model=tiny", *overrides, fix]))) > 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.experts=1", "moe.top_k=1"],
        ["moe.experts=8", "moe.top_k=8"],
        ["moe.top_k=1", "moe.renormalize=false"],
        ["moe.dense_layers=4", "moe.dense_width=64", "moe.experts=0", "moe.top_k=0", "moe.expert_width=0"],
    ],
    ids=" ".join,
)
def test_what_leaves_nothing_to_learn_or_something_is_accepted(overrides: list[str]) -> None:
    compose(["model=tiny", *overrides])


def test_a_warm_up_that_outlasts_the_run_is_announced() -> None:
    def said(*overrides: str) -> list[str]:
        config = compose([*SMALL, "run.steps=10", *overrides])
        device = torch.device("cpu")
        return announce_experts(config, resolve_on(config, device), device)

    assert len(said("moe.routing_warmup_steps=9")) == 1
    for steps in (10, 1000):
        (_, warning) = said(f"moe.routing_warmup_steps={steps}")
        assert warning.startswith(f"warning: moe.routing_warmup_steps={steps} does not end within run.steps=10")


def test_a_run_that_was_trained_so_can_still_be_read(tmp_path: Path) -> None:
    config = compose(SMALL)
    saved = replace(config, moe=replace(config.moe, top_k=1))
    (tmp_path / "config.yaml").write_text(dump(saved))
    assert load(tmp_path / "config.yaml") == saved
