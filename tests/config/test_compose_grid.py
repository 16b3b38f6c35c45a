"""The points of a grid: Hydra composes each choice of presets once, and the result equals its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kha_train.config import compose as module
from kha_train.errors import ConfigError
from kha_train.operate.sweep import plan_sweep

PRESETS = st.lists(
    st.sampled_from(["attention=kha_mlp", "attention=mla", "model=small", "engine=zero3", "optim=adamw", "~data"]),
    max_size=3,
    unique_by=lambda text: text.partition("=")[0],
)
VALUES = {
    "run.steps": st.integers(1, 10**6).map(str),
    "optim.lr": st.floats(1e-6, 1.0).map(repr),
    "optim.betas": st.sampled_from(["[0.9,0.99]", "[0.8, 0.95]"]),
    "run.name": st.sampled_from(
        ["plain", "'two words'", '"it\'s"', "${attention.name}-x", "null", "'null'", "${run.seed}"]
    ),
    "attention.backend": st.sampled_from(["eager", "sdpa"]),
    "optim.schedule": st.sampled_from(["{warmup: 0.1}", "{name: wsd, decay: 0.3}"]),
    "data.sources": st.sampled_from(["[]", "[{name: a, path: b, weight: 1}]"]),
    "checkpoint.background": st.sampled_from(["true", "False"]),
    "telemetry.wandb.group": st.sampled_from(["''", "g"]),
    "no.such.key": st.just("1"),
    "+new.key": st.just("2"),
    "run.nosuch": st.just("3"),
}
SETTINGS = st.lists(st.sampled_from(sorted(VALUES)), max_size=5, unique=True).flatmap(
    lambda keys: st.tuples(*(VALUES[key].map(lambda value, key=key: f"{key}={value}") for key in keys))
)


def outcome(merge: Any, overrides: Sequence[str]) -> Any:
    """The merged values with references unresolved, or the error as a user sees it."""
    try:
        return OmegaConf.to_container(merge(overrides), resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        return str(module._explain(error, list(overrides)))


@settings(max_examples=25, deadline=None)
@given(PRESETS, SETTINGS, st.randoms(use_true_random=False))
def test_a_point_is_what_hydra_composes_of_it_alone(presets: list[str], values: tuple[str, ...], order: Any) -> None:
    overrides = [*presets, *values]
    order.shuffle(overrides)
    assert outcome(module._merged, overrides) == outcome(module._composed, overrides)


def test_a_grid_asks_hydra_once_for_each_choice_of_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    composed = module._composed

    def count(overrides: Sequence[str]) -> Any:
        asked.append(tuple(overrides))
        return composed(overrides)

    monkeypatch.setattr(module, "_composed", count)
    module._chosen.cache_clear()
    grid = ["attention=gqa,kha_mlp,kha_linear", "seed=0,1,2,3,4", "optim.lr=0.001,0.002,0.003"]
    points = plan_sweep(tmp_path, grid)
    assert len(points) == 45 and len({point.label for point in points}) == 45
    assert sorted(asked) == [("attention=gqa",), ("attention=kha_linear",), ("attention=kha_mlp",)]


def test_a_point_leaves_no_trace_in_the_next() -> None:
    first = module.compose(["optim.betas=[0.5,0.6]", "run.steps=7", "run.name=odd"])
    second = module.compose([])
    assert first.optim.betas != second.optim.betas
    assert second.run.steps == 200 and second.run.name == "gqa-s0"


def test_an_edited_preset_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "configs"
    shutil.copytree(module.shipped("configs"), copy)
    monkeypatch.setattr(module, "shipped", lambda name: copy)
    assert module.compose([]).run.steps == 200
    main = copy / "config.yaml"
    main.write_text(main.read_text().replace("steps: 200", "steps: 12345"))
    assert module.compose([]).run.steps == 12345


def test_a_setting_that_is_not_there_is_named_in_a_grid_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.nosuch"):
        plan_sweep(tmp_path, ["seed=0,1", "run.nosuch=1"])
