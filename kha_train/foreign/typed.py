"""Plain values of a foreign file -> what the code expects, or one error that names file, field and fix.

A schema is a `TypedDict` (gives a dict that keeps the fields added by later releases), a dataclass (gives an instance;
an unknown field is an error), or any of: int, float, str, bool, None, Any, Literal, unions with None, `list[X]`,
`dict[str, X]`, `tuple[X, Y]`, `tuple[X, ...]`. `Annotated[X, ...]` adds `Range`, `Length`, `Match`, or an `Absent`
value for files older than the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from kha_train.errors import DataError, KhaError
from kha_train.foreign.documents import Json

T = TypeVar("T")
LARGEST = 2**53
"""No count of ours is larger, and every integer up to here is exact as a float."""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold: no bool, and no integer beyond `LARGEST`."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST)


@dataclass(frozen=True)
class Range:
    """A number from `least` to `most`."""

    least: float
    most: float


@dataclass(frozen=True)
class Length:
    """A list with this number of `entries`."""

    entries: int


@dataclass(frozen=True)
class Match:
    """Text that the `pattern` matches as a whole."""

    pattern: str


@dataclass(frozen=True)
class Absent:
    """The `value` of a field in older files that lack it."""

    value: Json


Count = Annotated[int, Range(0, LARGEST)]


@dataclass(frozen=True)
class Source:
    """A foreign file: its name in errors, the kind of those errors, and their fix."""

    name: str
    error: type[KhaError] = DataError
    fix: str = "restore it from a copy, or move it away"

    def fault(self, place: str, problem: str, value: object = None, allowed: str | None = None) -> KhaError:
        """The error about the value at `place` ("" for the whole file)."""
        where = f"{self.name} {place}".rstrip()
        return self.error(problem, field=where, value=short(value), allowed=allowed, fix=self.fix)

    def read(self, schema: type[T], value: object, place: str = "") -> T:
        """`value` checked against `schema`. Raises `error` naming the first field that is missing or of the wrong
        type.
        """
        converted: T = self._convert(schema, value, place)
        return converted

    def _convert(self, hint: Any, value: Any, place: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if is_typeddict(hint):
            return self._object(hint, value, place)
        if isinstance(hint, type) and is_dataclass(hint):
            return self._built(hint, value, place)
        if origin is Annotated:
            return self._bounded(arguments, value, place)
        if origin in (Union, UnionType):
            kinds = [kind for kind in arguments if kind is not NoneType]
            return None if value is None and NoneType in arguments else self._one_of(kinds, value, place)
        if origin is Literal:
            if not any(value == choice and type(value) is type(choice) for choice in arguments):
                raise self.fault(place, "not an allowed value", value, ", ".join(map(str, arguments)))
            return value
        if origin in (list, tuple, dict):
            return self._container(origin, arguments, value, place)
        if type(value) is not hint and not (hint is float and is_number(value)):
            raise self.fault(place, "wrong type", _null(value), _NAMES.get(hint, getattr(hint, "__name__", str(hint))))
        return value

    def _object(self, schema: type, value: Any, place: str) -> dict[str, Any]:
        found = self._mapping(value, place)
        for name, (hint, needed, absent) in _entries(schema).items():
            if name in found:
                found[name] = self._convert(hint, found[name], _join(place, name))
            elif absent is not None:
                found[name] = absent.value if not isinstance(absent.value, dict | list) else type(absent.value)()
            elif needed:
                raise self.fault(_join(place, name), "missing")
        return found

    def _built(self, schema: type, value: Any, place: str) -> Any:
        found, hints = self._mapping(value, place), _hints(schema)
        known = {field.name: field for field in fields(schema)}
        for name in found:
            if name not in known:
                raise self.fault(_join(place, name), "unknown field", allowed=", ".join(known))
        for name, field in known.items():
            if name in found:
                found[name] = self._convert(hints[name], found[name], _join(place, name))
            elif field.default is MISSING and field.default_factory is MISSING:
                raise self.fault(_join(place, name), "missing")
        return schema(**found)

    def _mapping(self, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.fault(place, "wrong type", _null(value), "an object")
        return dict(value)

    def _bounded(self, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
        found = self._convert(arguments[0], value, place)
        for rule in arguments[1:]:
            if isinstance(rule, Range) and not rule.least <= found <= rule.most:
                raise self.fault(place, "out of range", found, f"{rule.least} to {rule.most}")
            if isinstance(rule, Length) and len(found) != rule.entries:
                raise self.fault(place, f"has {len(found)} entries", allowed=f"{rule.entries}")
            if isinstance(rule, Match) and not re.fullmatch(rule.pattern, found):
                raise self.fault(place, "has the wrong form", found, rule.pattern)
        return found

    def _one_of(self, kinds: list[Any], value: Any, place: str) -> Any:
        # If a field tells which of several objects it is, report the error for that one.
        if isinstance(value, Mapping):
            kinds = [kind for kind in kinds if is_typeddict(kind) and _needed(kind) <= value.keys()] or kinds
        for kind in kinds[:-1]:
            try:
                return self._convert(kind, value, place)
            except self.error:
                continue
        return self._convert(kinds[-1], value, place)

    def _container(self, origin: type, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
        if origin is dict:
            return {
                key: self._convert(arguments[1], item, _join(place, key))
                for key, item in self._mapping(value, place).items()
            }
        if not isinstance(value, list):
            raise self.fault(place, "wrong type", _null(value), "a list")
        kinds = arguments if origin is tuple and arguments[-1] is not Ellipsis else (arguments[0],) * len(value)
        if len(kinds) != len(value):
            raise self.fault(place, f"has {len(value)} entries", allowed=f"{len(kinds)}")
        return origin(
            self._convert(kind, item, f"{place}[{index}]")
            for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )


def short(value: Json) -> Json:
    """How an error shows a foreign value: numbers in full, the beginning of anything else."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**40):
        return value
    if isinstance(value, int):
        return f"an integer of {value.bit_length()} bits"
    text = (
        value
        if isinstance(value, str)
        else f"{type(value).__name__} of {len(value)}"
        if isinstance(value, dict | list)
        else str(value)
    )
    return text if len(text) <= 80 else f"{text[:80]}..."


_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


def _null(value: Any) -> Any:
    """Errors show no value that is None, so null is spelled out."""
    return "null" if value is None else value


@cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


@cache
def _entries(schema: type) -> dict[str, tuple[Any, bool, Absent | None]]:
    """Field -> its type, whether it is required, and its value when absent."""
    entries = {}
    for name, hint in _hints(schema).items():
        optional = get_origin(hint) is NotRequired
        hint = get_args(hint)[0] if optional else hint
        rules = hint.__metadata__ if get_origin(hint) is Annotated else ()
        absent = next((rule for rule in rules if isinstance(rule, Absent)), None)
        needed = not optional and getattr(schema, "__total__", True)
        entries[name] = (hint, needed, absent)
    return entries


def _needed(schema: type) -> set[str]:
    return {name for name, (_, needed, absent) in _entries(schema).items() if needed and absent is None}


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else str(name)
