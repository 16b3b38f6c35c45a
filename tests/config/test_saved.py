"""In a configuration saved by an older release, missing settings have their declared earlier values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from kha_train.config import saved as saved_module
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, load
from kha_train.config.saved import BEFORE, completed
from kha_train.config.schema import RunConfig
from kha_train.variants.optimizer import OptimSection
from kha_train.variants.registry import BASES, INTERACTIONS, OPTIMIZERS, TASKS

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs"


def test_a_current_configuration_is_complete_as_it_is() -> None:
    config = to_plain(compose(["attention=kha_mlp"]))
    assert completed(config) == config


@pytest.mark.parametrize(
    ("absent", "earlier"),
    [
        (("moe", "routing_warmup_steps"), 0),
        (("moe", "auxiliary_loss"), {"weight": 0.0, "scope": "sequence"}),
        (("optim", "schedule", "warmup"), 0.05),
        (("optim", "name"), "adamw"),
        (("optim", "betas"), [0.9, 0.95]),
        (("data", "phases"), []),
        (("attention", "interaction", "impl"), "auto"),
    ],
)
def test_a_missing_setting_counts_as_its_declared_value_at_any_depth(absent: tuple[str, ...], earlier: Any) -> None:
    config = to_plain(compose(["attention=kha_mlp"]))
    *parents, name = absent
    section = config
    for parent in parents:
        section = section[parent]
    del section[name]
    filled: Any = completed(config)
    for key in absent:
        filled = filled[key]
    assert filled == earlier


def test_a_declared_earlier_value_wins_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class NewerOptim(OptimSection):
        warmth: float = field(default=1.0, metadata={BEFORE: 0.25})

    @dataclass(frozen=True, kw_only=True)
    class Newer:
        optim: NewerOptim

    monkeypatch.setattr(saved_module, "RunConfig", Newer)
    monkeypatch.setattr(saved_module, "get_type_hints", lambda cls: {one.name: _hint(one) for one in fields(cls)})

    def _hint(one: Any) -> Any:
        return NewerOptim if one.name == "optim" else float

    assert completed({"optim": {"lr": 0.1}})["optim"]["warmth"] == 0.25
    assert completed({"optim": {"lr": 0.1, "warmth": 0.5}})["optim"]["warmth"] == 0.5


def test_unknown_keys_and_wrong_types_are_left_for_their_readers_to_judge() -> None:
    odd = {"moe": [1], "later": {"key": 1}, "attention": {"base": {"name": "unheard of"}}}
    filled = completed(odd)
    assert filled["moe"] == [1] and filled["later"] == {"key": 1}
    assert filled["attention"]["base"] == {"name": "unheard of"}


@pytest.mark.parametrize("run", ["gqa", "kha_mlp"])
def test_the_configuration_of_an_old_run_loads_and_has_every_setting_of_today(run: str) -> None:
    path = OLD / "runs" / run / "config.yaml"
    assert completed(yaml.safe_load(path.read_text())) == to_plain(load(path))


def test_every_field_younger_than_the_old_runs_declares_its_earlier_value() -> None:
    before = json.loads((OLD / "fields.json").read_text())
    undeclared = [
        f"{cls.__name__}.{one.name}"
        for cls in _classes()
        for one in fields(cls)
        if one.name not in before.get(cls.__name__, [entry.name for entry in fields(cls)])
        and one.default is MISSING
        and one.default_factory is MISSING
        and BEFORE not in one.metadata
    ]
    assert not undeclared, f"give a default or metadata={{'{BEFORE}': ...}}: {undeclared}"


def _classes(root: type = RunConfig) -> Iterator[type]:
    """Every class of the configuration, variants' options included."""
    pending = [
        root,
        *(variant.options_class() for names in (BASES, INTERACTIONS, OPTIMIZERS, TASKS) for variant in names.values()),
    ]
    seen: set[type] = set()
    while pending:
        cls = pending.pop()
        if cls in seen:
            continue
        seen.add(cls)
        yield cls
        hints = get_type_hints(cls).values()
        pending += [
            one for hint in hints for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)
        ]
