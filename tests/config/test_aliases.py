"""For names and spellings of other programs, errors suggest what to type here."""

from __future__ import annotations

import pytest

from kha_train.config.aliases import ADVICE, ALIASES
from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import STUDIES, compose, shipped
from kha_train.config.presets import chosen_as
from kha_train.errors import ConfigError, Replace

SETTINGS = flatten(to_plain(compose()))
GROUPS = {chosen_as(path.name) for path in shipped("configs").iterdir() if path.is_dir() and path.name != STUDIES}
TYPED_BY_HABIT = {
    "run.steps 7": "run.steps=7",
    "run.steps:7": "run.steps=7",
    "run.steps = 7": "run.steps=7",
    "run.steps= 7": "run.steps=7",
    "run.steps =7": "run.steps=7",
    "run.steps: 7": "run.steps=7",
    "steps 7": "run.steps=7",
    "max_steps: 7": "run.steps=7",
    "-- --steps 7": "run.steps=7",
    "-- --run.steps=7": "run.steps=7",
    "kha_mlp": "attention=kha_mlp",
    "attention kha_mlp": "attention=kha_mlp",
    "knocking_mlp": "interaction@attention.interaction=knocking_mlp",
    "interaction knocking_mlp": "interaction@attention.interaction=knocking_mlp",
    "run.dir /some/where": "run.dir=/some/where",
}


def _refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        compose(list(overrides))
    return raised.value


def test_every_alias_stands_for_a_setting_or_group_that_exists_and_is_none_itself() -> None:
    assert set(ALIASES.values()) <= SETTINGS.keys() | GROUPS
    assert not (ALIASES.keys() | ADVICE.keys()) & (SETTINGS.keys() | GROUPS)
    assert not ALIASES.keys() & ADVICE.keys()


@pytest.mark.parametrize("alias", ["learning_rate", "optim.learning_rate", "trainer.learning-rate", "Learning_Rate"])
def test_the_learning_rate_of_other_frameworks_is_answered_with_ours(alias: str) -> None:
    error = _refused(f"{alias}=1e-3")
    assert error.fix == "did you mean optim.lr?"
    (fix,) = error.typed_fixes
    assert isinstance(fix, Replace) and compose([f"{fix.typed}=1e-3"]).optim.lr == 1e-3


def test_names_of_other_frameworks_are_answered_with_ours() -> None:
    # Every fortieth: all of them would take half a minute.
    for alias, ours in list(ALIASES.items())[::40]:
        assert _refused(f"{alias}=1").fix == f"did you mean {ours}?", alias


def test_what_is_not_here_is_answered_with_what_is() -> None:
    for alias in ("batch_size", "gradient_accumulation_steps", "num_train_epochs", "warmup_steps", "fp16", "dropout"):
        error = _refused(f"{alias}=1")
        assert error.fix == ADVICE[alias] and not error.typed_fixes


@pytest.mark.parametrize("typed", TYPED_BY_HABIT)
def test_an_override_typed_in_another_way_is_answered_with_the_override(typed: str) -> None:
    words = [word for word in typed.split() if word != "--"]
    (fix,) = _refused(*words).typed_fixes
    assert fix == TYPED_BY_HABIT[typed]
    assert isinstance(fix, Replace) and fix.old == " ".join(words)


def test_a_value_that_may_be_a_secret_is_not_repeated() -> None:
    for typed in (["data.train", "me@hunter2"], ["--data.train=me@hunter2"]):
        assert _refused(*typed).fix == "data.train=..."
    assert "hunter2" not in str(_refused("data.train", "s3://me:hunter2@store/x").fix)
