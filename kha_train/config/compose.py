"""YAML groups and overrides -> `RunConfig`. The only user of Hydra and OmegaConf inside the package.

Hydra merges, nothing more: it never changes the working directory, never makes a run directory, never instantiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kha_train.config.build import build, flatten, nearest, to_plain
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(directory: str) -> Path:
    """`configs` or `launch`, from an installed wheel (inside the package) or from a checkout (beside it)."""
    installed = PACKAGE / directory
    return installed if installed.is_dir() else PACKAGE.parent / directory


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run from `configs/config.yaml` and Hydra overrides such as `attention=kha_mlp`.

    Raises ConfigError for an override that does not parse, an unknown key or group, a wrong type, a setting left
    open, or a combination that cannot run.
    """
    config = build(RunConfig, _merge(list(overrides)))
    validate(config)
    return config


def load(path: Path) -> RunConfig:
    """The configuration saved in a run directory. Raises ConfigError when it is missing or not ours."""
    if not path.is_file():
        raise ConfigError("no such file", field="config", value=str(path), fix="name a run directory of `kha train`")
    config = build(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")))
    validate(config)
    return config


def dump(config: RunConfig) -> str:
    """`config` as the YAML text that `load` reads back equal."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def _merge(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_presets(overrides)
    try:
        with initialize_config_dir(str(shipped("configs")), version_base="1.3"):
            merged = hydra_compose("config", overrides=overrides)
        _refuse_code(OmegaConf.to_container(merged, resolve=False))
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from None


def _check_presets(overrides: list[str]) -> None:
    """Hydra takes other things than names for a preset, and then fails in its own ways; its own settings it takes in
    silence although nothing here reads them."""
    presets = {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in shipped("configs").iterdir()}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        name = value.strip("'\"")
        group = key.partition("@")[0]
        if presets.get(group) and name not in presets[group]:
            raise ConfigError("no such preset", field=group, value=name, **nearest(name, presets[group]))
        if key.startswith("hydra"):
            raise ConfigError("Hydra's own settings have no effect here", field=key, fix="leave it out")


def _refuse_code(values: Any, path: str = "config") -> None:
    """A configuration is data: no `_target_`, and interpolation only between its own keys."""
    if isinstance(values, dict):
        for key, value in values.items():
            if str(key).startswith("_"):
                raise ConfigError("keys that start with an underscore are not configuration", field=f"{path}.{key}")
            _refuse_code(value, f"{path}.{key}")
    elif isinstance(values, list):
        for value in values:
            _refuse_code(value, path)
    elif isinstance(values, str) and ":" in values.partition("${")[2]:
        raise ConfigError("resolvers are not allowed in a configuration", field=path, value=values)


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    """Hydra's own words, cut to one line; an unknown key is told with what stands beside it."""
    message = " ".join(str(error).split())
    for override in overrides:
        key, equals, _ = override.lstrip("+~").partition("=")
        if not equals:
            return ConfigError("an override is KEY=VALUE", field="override", value=override)
        if f"'{key}'" in message and ("not in struct" in message or "Could not override" in message):
            return _unknown_key(key)
    return ConfigError(message, field="override", value=" ".join(overrides))


def _unknown_key(key: str) -> ConfigError:
    """Names the keys of the group that `key` was looked for in, and the nearest of all keys."""
    known = list(flatten(_merge([])))
    parent = key.rpartition(".")[0]
    siblings = [name for name in known if name.startswith(f"{parent}.")] if parent else []
    groups = sorted({name.partition(".")[0] for name in known})
    fix = nearest(key, known + groups).get("fix")
    return ConfigError("unknown key", field=key, allowed=", ".join(siblings or groups), fix=fix)
