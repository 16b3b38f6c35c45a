"""Every preset has one spelling; every other spelling is refused in one line, with the right one if it is known."""

from __future__ import annotations

import pytest

from kha_train.cli.main import run
from kha_train.config import compose as composing
from kha_train.config.compose import compose, shipped
from kha_train.config.presets import chosen_as
from kha_train.errors import ConfigError, Replace

PRESETS = {
    group.name: sorted(path.stem for path in group.glob("*.yaml"))
    for group in shipped("configs").glob("*/")
    if group.name != composing.STUDIES
}
ADVISED = ("{group}@x", "{group}@", "{group}@{group}", "{group}@_global_", "{group}@optim", "+{key}", "++{key}",
           "+{group}@x", "++{group}@{group}")  # fmt: skip
REFUSED = ("~{key}", "~{group}@x", "x/{group}", "{group}/x", "x.{group}", "/{group}", "{group}@:x")


def _refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        compose(list(overrides))
    assert raised.value.exit_code == 2 and "\n" not in raised.value.line()
    return raised.value


@pytest.fixture
def few_merges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of merges, which ends the test if it grows without limit."""
    merge, count = composing._merge, [0]

    def counted(overrides: list[str], name: str = "") -> dict[str, object]:
        count[0] += 1
        assert count[0] <= 8, "the explanation of an error asks for itself"
        return merge(overrides, name)

    monkeypatch.setattr(composing, "_merge", counted)
    return count


@pytest.mark.parametrize("group", PRESETS)
def test_a_preset_by_another_spelling_is_answered_with_its_own(group: str, few_merges: list[int]) -> None:
    preset = PRESETS[group][0]
    spellings = [spelling.format(group=group, key=chosen_as(group)) for spelling in ADVISED]
    for typed in [*spellings, *([group] if group != chosen_as(group) else [])]:
        few_merges[0] = 0
        (fix,) = _refused(f"{typed}={preset}").typed_fixes
        assert isinstance(fix, Replace) and fix.typed == f"{chosen_as(group)}={preset}", typed


@pytest.mark.parametrize("group", PRESETS)
def test_any_other_spelling_of_a_group_ends_in_a_configuration_error(group: str, few_merges: list[int]) -> None:
    for spelling in REFUSED:
        for value in (PRESETS[group][0], "nothing_like_it"):
            few_merges[0] = 0
            _refused(f"{spelling.format(group=group, key=chosen_as(group))}={value}")


@pytest.mark.parametrize("typed", ["config.yml=1", "confg.yaml=x", "config.yaml=x"])
def test_the_file_beside_the_groups_is_none_of_them(typed: str) -> None:
    assert not _refused(typed).typed_fixes


def test_a_preset_of_one_other_group_is_answered_with_that_group() -> None:
    homes: dict[str, list[str]] = {}
    for group, names in PRESETS.items():
        for name in names:
            homes.setdefault(name, []).append(group)
    for name in ("mla", "knocking_linear", "tiny", "adamw", "rewind"):
        (home,) = homes[name]
        for group in PRESETS.keys() - {home}:
            (fix,) = _refused(f"{group}={name}").typed_fixes
            assert fix.typed == f"{chosen_as(home)}={name}"


@pytest.mark.parametrize(
    ("typed", "instead"),
    {
        "interaction=knocking_linear": "interaction@attention.interaction=knocking_linear",
        "attention.interaction=knocking_linear": "interaction@attention.interaction=knocking_linear",
        "head_interaction=knocking_linear": "interaction@attention.interaction",
        "attention.base=mla": "attention=mla",
        "optim.schedule=wsd": "optim.schedule.name",
        "telemetry.wandb=offline": "telemetry.wandb.mode",
        "data@x=quickstart": "data=quickstart",
    }.items(),
)
def test_what_is_typed_by_habit_is_answered_with_what_works(typed: str, instead: str, few_merges: list[int]) -> None:
    (fix,) = _refused(typed).typed_fixes
    assert isinstance(fix, Replace) and fix.typed == instead
    compose([typed.replace(fix.old, fix.typed)])


def test_a_choice_that_hydra_refuses_is_explained_once(monkeypatch: pytest.MonkeyPatch, few_merges: list[int]) -> None:
    """A preset of one's own may have no place for the choice beside it: then Hydra knows of none to override."""
    monkeypatch.setattr(composing, "check_presets", lambda overrides, presets: None)
    _refused("interaction=knocking_linear")
    few_merges[0] = 0
    _refused("data@x=quickstart", "run.stesp=1")


def test_the_command_ends_with_2_and_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["plan", "attention=mla", "interaction=knocking_linear"])
    assert ended.value.code == 2
    assert "fix: interaction@attention.interaction=knocking_linear" in capsys.readouterr().err
