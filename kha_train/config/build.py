"""Plain values -> the frozen dataclass tree, strictly: unknown keys and wrong types are errors that name the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from kha_train.config import aliases
from kha_train.errors import ConfigError, Replace, Settings
from kha_train.foreign.documents import Json
from kha_train.variants.attention import BaseOptions, InteractionOptions
from kha_train.variants.optimizer import OptimSection
from kha_train.variants.registry import BASES, INTERACTIONS, OPTIMIZERS, TASKS, Variant
from kha_train.variants.task import TaskOptions


class Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=Dataclass)
_hints = cache(get_type_hints)
"""The types of a class, which Python evaluates anew at each call."""
REGISTRIES: dict[type[Any], Mapping[str, Variant[Any]]] = {
    BaseOptions: BASES,
    InteractionOptions: INTERACTIONS,
    OptimSection: OPTIMIZERS,
    TaskOptions: TASKS,
}
"""Sections whose `name` selects one of several classes of options."""


def build(cls: type[T], values: object, path: str = "") -> T:
    """The dataclass `cls` from nested plain `values`; `path` is their place in the tree ("" for the root).

    Raises ConfigError for an unknown key (naming the nearest), a missing one, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        fix = _choice_inside(cls, values, path)
        raise ConfigError("expected a group of settings", field=path or "config", value=values, fix=fix)
    chosen: type[T] = variant_class(cls, values, path)
    hints = _hints(chosen)
    known = [field.name for field in fields(chosen)]
    for key in values:
        if key not in known:
            raise ConfigError("unknown key", field=_join(path, str(key)), **_known_instead(str(key), known, path))
    arguments = {}
    for field in fields(chosen):
        where = _join(path, field.name)
        if field.name in values and values[field.name] != "???":
            arguments[field.name] = _convert(hints[field.name], values[field.name], where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError("not set", field=where, fix=f"add {where}=VALUE")
    return chosen(**arguments)


def _choice_inside(cls: type[T], value: object, path: str) -> Replace | None:
    """The fix when a section `path` was given `value`, the value of exactly one choice in it."""
    hints = _hints(cls)
    takes = [field.name for field in fields(cls) if get_origin(hints[field.name]) is Literal]
    takes = [name for name in takes if isinstance(value, str) and value in get_args(hints[name])]
    return did_you_mean(path, f"{path}.{takes[0]}") if len(takes) == 1 else None


def to_plain(config: Dataclass) -> dict[str, Any]:
    """The tree as nested dicts, lists, strings and numbers, as written to `<run.dir>/config.yaml`."""
    return {key: plain(value) for key, value in asdict(config).items()}


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested plain values as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        where = _join(path, key)
        flat |= flatten(value, where) if isinstance(value, Mapping) else {where: value}
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`. A value where `flat` has a section too gives way to the section."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[name] = value
    return values


def without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """`flatten` without the paths in `data.sources` and `validation.sets`: where data are says nothing about their
    content.
    """
    flat = flatten(values)
    lists = {key: flat.get(key) or [] for key in ("data.sources", "validation.sets")}
    return flat | {
        key: [{name: value for name, value in item.items() if name != "path"} for item in items]
        for key, items in lists.items()
    }


SEEDS = ("data.seed", "moe.routing_seed")
"""Settings, by dotted keys, that stand for `run.seed` where they are null."""


def with_seeds(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `flat`, by dotted keys, with each of `SEEDS` that is null at the value it stands for."""
    return {**flat, **{key: flat.get("run.seed") for key in SEEDS if flat.get(key) is None}}


def without_seeds(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `flat`, by dotted keys, with each of `SEEDS` null that has the value it stands for then."""
    return {**flat, **dict.fromkeys(key for key in SEEDS if key in flat and flat[key] == flat.get("run.seed"))}


def nearest(key: str, known: Iterable[str], path: str = "") -> dict[str, str]:
    """`allowed` and `fix` of the error about an unknown `key`."""
    known = list(known)
    close = get_close_matches(key, known, n=1)
    hint = {"fix": did_you_mean(_join(path, key), _join(path, close[0]))} if close else {}
    return {"allowed": ", ".join(known), **hint}


def did_you_mean(typed: str, meant: str) -> Replace:
    """The fix for a key or value `typed` when `meant` exists."""
    return Replace(meant, "did you mean {}?", old=typed)


def _known_instead(key: str, known: list[str], path: str) -> dict[str, str]:
    """`nearest`, or the advice for a setting `key` of other frameworks."""
    ours = aliases.own_name(key)
    fix = did_you_mean(_join(path, key), ours) if ours else aliases.advice(key)
    return nearest(key, known, path) | ({"fix": fix} if fix else {})


def variant_class(cls: type[Any], values: Mapping[str, Any], path: str) -> type[Any]:
    """The options dataclass named by `values` if `cls` is a base, an interaction, an optimiser or an evaluation task,
    else `cls`.

    Raises ConfigError for a name that is not registered.
    """
    registry = REGISTRIES.get(cls)
    if registry is None:
        return cls
    # Without a name the field's default applies; only an optimiser has one.
    name = values.get("name", vars(cls).get("name"))
    if not isinstance(name, str) or name not in registry:
        raise ConfigError("no such variant", field=f"{path}.name", value=name, **nearest(str(name), registry))
    return registry[name].options_class()


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        # The only union of the schema: a value, or null for what stands for it.
        return None if value is None else _convert(arguments[0], value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ConfigError(
                "not an allowed value", field=where, value=value, **nearest(str(value), map(str, arguments))
            )
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError("wrong type", field=where, value=value, allowed=hint.__name__)
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        many = (
            arguments[-1] is Ellipsis and isinstance(value, str | int | float) and re.fullmatch(r"[\w.-]+", str(value))
        )
        fix = Settings(f"{where}=[{value}]") if many else f"a list: {where}=[...]"
        raise ConfigError("expected a list", field=where, value=value, fix=fix)
    if arguments[-1] is Ellipsis:
        # A task may be given by its name alone.
        is_task = arguments[0] is TaskOptions
        items = [{"name": item} if is_task and isinstance(item, str) else item for item in value]
        return tuple(_convert(arguments[0], item, where) for item in items)
    if len(value) != len(arguments):
        raise ConfigError(f"expected {len(arguments)} values", field=where, value=value)
    return tuple(_convert(hint, item, where) for hint, item in zip(arguments, value, strict=True))


def plain(value: Json) -> Json:
    """`value` with mappings as dicts and tuples as lists, as in YAML and JSON."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
