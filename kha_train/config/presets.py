"""How presets are chosen on the command line, and the fixes for other spellings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from kha_train.config.build import did_you_mean, nearest
from kha_train.errors import ConfigError, Instead, Replace
from kha_train.foreign.documents import Json

_PLACES = {"interaction": "interaction@attention.interaction"}
"""Group -> how it is chosen, if not by its own name."""
_SECTIONS = {"attention.interaction": "interaction", "attention.base": "attention"}
"""Section of settings -> the group whose presets fill it, if their names differ."""


def chosen_as(group: str) -> str:
    """The left side of the override that chooses a preset of `group`."""
    return _PLACES.get(group, group)


def check_presets(overrides: Sequence[str], presets: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError for an unknown preset in its group of `presets`, for one chosen in another way than
    `chosen_as`, and for Hydra's own settings, which have no effect here.

    Hydra accepts other things than names as a preset, and other packages than ours, and then fails with its own errors.
    """
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            continue
        name = value.strip("'\"")
        group = key.partition("@")[0]
        if key.startswith("hydra"):
            raise ConfigError("Hydra's own settings have no effect here", field=key, fix="leave it out")
        if presets.get(group):
            _check_choice(override, group, name, presets)
        elif name in presets.get(_SECTIONS.get(key, ""), ()):
            raise _chosen_otherwise(override, _SECTIONS[key], name)


def _check_choice(override: str, group: str, name: str, presets: Mapping[str, Sequence[str]]) -> None:
    if name not in presets[group]:
        homes = [other for other, names in presets.items() if name in names]
        told = nearest(name, presets[group])
        if len(homes) == 1 and not override.startswith("~"):
            told["fix"] = did_you_mean(override, f"{chosen_as(homes[0])}={name}")
        raise ConfigError("no such preset", field=group, value=name, **told)
    if override.startswith("~"):
        raise ConfigError("a preset can be chosen but not deleted", field=group, value=name, fix="leave it out")
    if override.partition("=")[0] != chosen_as(group):
        raise _chosen_otherwise(override, group, name)


def _chosen_otherwise(override: str, group: str, name: str) -> ConfigError:
    fix = Replace(f"{chosen_as(group)}={name}", old=override)
    return ConfigError("a preset is chosen in another way", field=override.partition("=")[0], value=name, fix=fix)


def refuse_code(values: Json, path: str = "config") -> None:
    """A configuration is data. Raises ConfigError for `_target_`, which Hydra could call, and for interpolations other
    than between its own keys.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            if str(key).startswith("_"):
                raise ConfigError("keys that start with an underscore are not configuration", field=f"{path}.{key}")
            refuse_code(value, f"{path}.{key}")
    elif isinstance(values, list):
        for value in values:
            refuse_code(value, path)
    elif isinstance(values, str) and ":" in values.partition("${")[2]:
        raise ConfigError("resolvers are not allowed in a configuration", field=path, value=values)


def sweep_command(overrides: Sequence[str]) -> Instead:
    """The `kha sweep` command that trains the grid `overrides` here. Every point needs its own run directory, so a
    given `run.dir` becomes the sweep's.
    """
    places = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    kept = [text for text in overrides if not text.startswith("run.dir=")]
    return Instead(shlex.join(["kha", "sweep", *kept, *(f"--dir={place}" for place in places[-1:]), "--local"]))
