"""YAML groups and overrides -> `RunConfig`. The only user of Hydra and OmegaConf inside the package.

Hydra only merges: it never changes the working directory, makes a run directory or instantiates objects.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from kha_train.config import aliases
from kha_train.config.build import build, did_you_mean, flatten, nearest, to_plain
from kha_train.config.first_steps import quickstart_first
from kha_train.config.naming import AUTO, at_home, run_name
from kha_train.config.presets import check_presets, chosen_as, refuse_code, sweep_command
from kha_train.config.saved import SavedConfig, completed
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.errors import ConfigError, Replace, Typed
from kha_train.foreign.documents import as_yaml, parse_yaml
from kha_train.foreign.files import SMALL, read_regular
from kha_train.foreign.typed import Source

PACKAGE = Path(__file__).resolve().parents[1]
STUDIES = "study"
"""The folder of `configs` that holds studies, which are no presets."""
_SETTING = re.compile(r"[A-Za-z_][\w.]*=")
"""A setting of an existing key in Hydra's grammar: nothing added, deleted or chosen for another package."""


def shipped(directory: str) -> Path:
    """`configs` or `launch`, from an installed wheel (inside the package) or a checkout (beside it)."""
    installed = PACKAGE / directory
    return installed if installed.is_dir() else PACKAGE.parent / directory


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run from `configs/config.yaml` and Hydra overrides such as `attention=kha_mlp`.

    Raises ConfigError for an override that does not parse, an unknown key or group, a wrong type, an unset setting, or
    a combination that cannot run.
    """
    values = _merge(list(overrides))
    config = build(RunConfig, values)
    if config.run.name == AUTO:
        name = run_name(overrides, preset_groups(), config, _merge)
        config = build(RunConfig, _merge(list(overrides), name))
    validate(config)
    return config


def compose_at_home(overrides: Sequence[str]) -> RunConfig:
    """`compose`, for a run to be trained: a run that an older release began stays in its directory."""
    return at_home(compose(overrides), overrides, load_plain)


def load(path: Path) -> RunConfig:
    """The configuration saved in a run directory. Raises ConfigError when it is missing or not ours, DataError as
    `load_plain`."""
    if not path.is_file():
        fix = quickstart_first(path) or "name a run directory that `kha train` wrote"
        raise ConfigError("no such file", field="config", value=str(path), fix=fix)
    return from_plain(load_plain(path))


def from_plain(values: dict[str, Any]) -> RunConfig:
    """The configuration of saved nested `values`, for inspecting what was trained. Raises ConfigError when they are not
    ours.
    """
    config = build(RunConfig, values)
    validate(config, to_train=False)
    return config


def load_plain(path: Path) -> dict[str, Any]:
    """The values saved in a run directory of any version, completed with settings added later.

    Empty when there is no such file. Raises DataError when it is damaged or not a configuration.
    """
    raw, source = read_regular(path, SMALL), Source(str(path), fix="restore it from a copy")
    try:
        values = parse_yaml(raw or b"")
    except ValueError as error:
        raise source.fault("", f"cannot be read: {error}") from error
    return completed(source.read(SavedConfig, values)) if values is not None else {}


def dump(config: RunConfig) -> str:
    """`config` as YAML text; `load` reads it back unchanged."""
    return as_yaml(to_plain(config))


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The points of a grid: `attention=gqa,kha_mlp run.seed=0,1` gives four lists of overrides; the last key varies
    fastest.

    Hydra's grammar decides what is a list of choices (`a,b`, `choice(a,b)`, `range(0,3)`) and what is one value
    (`[a,b]`, `'a,b'`). Settings that are not swept stay as typed. Raises ConfigError for overrides that do not parse.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        choices = [
            [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
            if one.is_discrete_sweep()
            else [text]
            for one, text in zip(parsed, overrides, strict=True)
        ]
    except HydraException as error:
        raise _explain(error, list(overrides)) from None
    return [list(point) for point in itertools.product(*choices)]


def _refuse_grids(overrides: list[str]) -> None:
    """Raises ConfigError for several values of one setting, with the sweep that trains them."""
    # Only these characters can form a list of choices, and the parser is slow.
    for text in (text for text in overrides if re.search(r"=.*[,(]", text)):
        parsed = _parsed(text)
        if not parsed.is_sweep_override():
            continue
        kind = parsed.value_type
        listed = parsed.is_discrete_sweep() and kind is not None and kind.name != "GLOB_CHOICE_SWEEP"
        raise ConfigError(
            "a run takes one value",
            field=parsed.get_key_element(),
            value=text.partition("=")[2],
            fix=sweep_command(overrides) if listed else "give the values as in a,b, and train them with `kha sweep`",
        )


_NOT_TEXT = ("true", "false", "null", "nan", "inf")
"""Words that Hydra does not read as text, in capitals too."""


def quoted(value: str) -> str:
    """`value` as the right side of an override that Hydra reads back as exactly this text.

    Raises ConfigError for text with an interpolation, which cannot be written as a plain value.
    """
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", value, re.ASCII) and value.lower() not in _NOT_TEXT:
        return value
    if "${" in value:
        raise ConfigError("a plain value cannot contain an interpolation", field="override", value=value)
    # Between quotes only quotes are special, and backslashes directly before them.
    inside = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inside) + "'"


def _merge(overrides: list[str], name: str = "") -> dict[str, Any]:
    """`overrides` as plain values with interpolations resolved; `name`, if any, is the run's."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _refuse_grids(overrides)
        check_presets(overrides, preset_groups())
        merged = _merged(overrides)
        refuse_code(OmegaConf.to_container(merged, resolve=False))
        typed = {text.partition("=")[0].lstrip("+"): text.partition("=")[2] for text in overrides}
        if "attention" in typed and "attention.name" not in typed:
            # A preset is named after its file, whatever it was copied from.
            merged.attention.name = typed["attention"].strip("'\"")
        if name:
            merged.run.name = name
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from None


def _merged(overrides: Sequence[str]) -> Any:
    """The configuration of `overrides` as Hydra merges it, with interpolations unresolved.

    A sweep has many points but few combinations of presets, and Hydra takes a tenth of a second to read presets. So
    each combination is composed once, and settings are applied to a copy as Hydra would. Raises as Hydra does.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = preset_groups()
    presets = [text for text in overrides if text.partition("=")[0] in groups]
    settings = [text for text in overrides if text.partition("=")[0] not in groups]
    if not all(map(_SETTING.match, settings)):
        return _composed(overrides)
    merged = copy.deepcopy(_chosen(_stamp(), *presets))
    try:
        for override in map(_parsed, settings):
            OmegaConf.update(merged, override.key_or_group, override.value(), merge=True)
    except OmegaConfBaseException:
        # Let Hydra raise its own errors.
        return _composed(overrides)
    return merged


def _composed(overrides: Sequence[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with _own_hydra(), initialize_config_dir(str(shipped("configs")), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


class Part(NamedTuple):
    """A file of values, the section that it fills ("" for the root), and the file that chose it."""

    path: Path
    section: str
    chosen_by: str


def parts(overrides: Sequence[str]) -> list[Part]:
    """The files of `configs` that `overrides` combine, in the order in which Hydra merges them: the last one to have a
    key decides it. Raises as Hydra does.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    folder = shipped("configs")
    with _own_hydra(), initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        chosen = loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults
    return [
        Part(folder / f"{one.config_path}.yaml", one.package or "", one.parent or "")
        for one in chosen
        if one.config_path and one.config_path.partition("/")[0] != "hydra"
    ]


@lru_cache(maxsize=64)
def _chosen(stamp: tuple[Any, ...], *presets: str) -> Any:
    """The configuration of `presets` without any other setting. `stamp` identifies the state of the preset files."""
    return _composed(presets)


@lru_cache(maxsize=1024)
def _parsed(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def _stamp() -> tuple[Any, ...]:
    """A value that changes with any preset file."""
    files = ((path, path.stat()) for path in sorted(shipped("configs").rglob("*.yaml")))
    return tuple((str(path), status.st_mtime_ns, status.st_size) for path, status in files)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Inside a Hydra application, Hydra is already initialised and allows only one instance: put it aside for now."""
    from hydra.core.global_hydra import GlobalHydra

    one = GlobalHydra.instance()
    outer = one.hydra
    one.clear()
    try:
        yield
    finally:
        one.hydra = outer


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    """Hydra's own message, shortened to one line and without the given values, which may hold a secret. For an unknown
    key, the keys beside it are listed.
    """
    message, named = " ".join(str(error).split()), []
    for at, override in enumerate(overrides):
        key, equals, value = override.lstrip("+~").partition("=")
        if not equals or not key or key.startswith("-"):
            return _not_an_override(at, overrides)
        if f"'{key}'" in message and ("not in struct" in message or "Could not override" in message):
            return unknown_key(key, overrides)
        if not _parses(override):
            return ConfigError(
                "the value cannot be parsed",
                field="override",
                value=f"{key}=...",
                fix=f"put the value in quotes: {_example(key, value)}; lists are [a,b], groups {{key: value}}",
            )
        named += [f"{key}=..."] if key in message else []
        message = message.replace(override, f"{key}=...").replace(value, "...") if len(value) > 1 else message
    return ConfigError(message, field="override", value=" ".join(named) or None)


def _example(key: str, value: str) -> str:
    """The override as it should be typed, including the shell's quotes. Only plain words are repeated: a value with
    brackets, quotes or a URL may have another meaning, or hold a secret.
    """
    return f'"{key}={quoted(value)}"' if re.fullmatch(r"[\w ./+-]+", value) else f"{key}='...'"


def _parses(override: str) -> bool:
    from hydra.errors import HydraException

    try:
        _parsed(override)
    except HydraException:
        return False
    return True


def unknown_key(key: str, overrides: list[str]) -> ConfigError:
    """Lists the keys of the group in which `key` was looked up, and the one that may be meant. Keys are those of the
    presets chosen in `overrides`.
    """
    known = _keys_beside(overrides)
    parent, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    names = sorted({other.partition(".")[0] for other in known})
    inside = bool(parent and siblings)
    fix: str | None = aliases.advice(key)
    if inside and get_close_matches(name, siblings, n=1):
        fix = nearest(name, siblings, parent)["fix"]
    elif meant := _meant(key, known):
        fix = did_you_mean(key, meant)
    allowed = ", ".join(siblings.values() if inside else names)
    return ConfigError("unknown key", field=key, allowed=allowed, fix=fix, code="E15")


def _keys_beside(overrides: list[str]) -> list[str]:
    """The keys of the presets chosen in `overrides`; of the valid ones alone if Hydra refuses them together."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = [text for text in overrides if text.partition("=")[0].partition("@")[0] in preset_groups()]
    try:
        values = OmegaConf.to_container(_merged(chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        values = _merge([])
    assert isinstance(values, dict)
    return list(flatten({str(key): value for key, value in values.items()}))


def _meant(key: str, known: list[str]) -> str | None:
    """The setting or group that an unknown `key` stands for: the only one with that last name, the one that other
    frameworks call so, or the nearest; None where nothing is near or we have no such setting.
    """
    name = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == name]
    if len(same) == 1:
        return same[0]
    ours = aliases.own_name(key)
    if ours or aliases.advice(key):
        return ours
    close = get_close_matches(key, [*known, *preset_groups()], n=1)
    return chosen_as(close[0]) if close else None


def override_for(name: str, value: str) -> str | None:
    """`KEY=VALUE` for a setting that the user calls `name` (`run.steps`, `steps`, `max_steps`, `attention`); None where
    there is no such setting. A value that may hold a secret is not repeated.
    """
    known = list(flatten(_merge([])))
    key = chosen_as(name) if name in (*known, *preset_groups()) else _meant(name, known)
    if key is None:
        return None
    return f"{key}={value}" if re.fullmatch(r"[\w./+-]+", value) else f"{key}=..."


def _not_an_override(at: int, overrides: list[str]) -> ConfigError:
    """`overrides[at]` is not an override. It may be a setting in another form: `KEY VALUE`, `KEY:VALUE`, `KEY = VALUE`,
    an option; or a preset without its group.
    """
    fix: Typed | None = None
    # Three, two or one words that begin here or one word earlier.
    for first, length in ((at, 3), (at - 1, 2), (at, 2), (at, 1)):
        typed = " ".join(overrides[first : first + length]) if first >= 0 else ""
        words = re.fullmatch(r"-{0,2}([A-Za-z_][\w.-]*)(?: ?[=:] ?| )([^\s=:,]+)", typed)
        meant = override_for(words[1].replace("-", "_"), words[2]) if words else None
        if meant:
            fix = Replace(meant, old=typed)
            break
    groups = [group for group, names in preset_groups().items() if overrides[at] in names]
    if fix is None and len(groups) == 1:
        fix = Replace(f"{chosen_as(groups[0])}={overrides[at]}", old=overrides[at])
    return ConfigError("an override is KEY=VALUE", field="override", value=overrides[at], fix=fix)


def preset_groups() -> dict[str, list[str]]:
    """The names of the presets of every group."""
    groups = (path for path in shipped("configs").iterdir() if path.is_dir() and path.name != STUDIES)
    return {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in groups}
