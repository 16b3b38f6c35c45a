"""Keys of a host's config.json and settings of ours: what each is of the other, in both directions.

`Field` is a key whose value follows from settings, and settings that follow from its value. `Fixed` is a key that has
one value only, because our decoder computes nothing else. An export writes every key of a family, also where the
host's default is the same; a key that config.json lacks is read as that default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, cast

from kha_train.config.schema import RunConfig
from kha_train.foreign.documents import Json
from kha_train.foreign.typed import Range, Source

Settings = dict[str, Json]
"""Settings of ours by dotted key, as overrides name them: `{"model.layers": 4}`."""
Size = Annotated[int, Range(1, 2**31)]
Number = Annotated[int, Range(0, 2**31)]
Positive = Annotated[float, Range(1e-30, 1e30)]
REQUIRED = object()
"""In place of a default: the key must be there."""


@dataclass(frozen=True)
class Reading:
    """The values of a foreign config.json, checked as they are taken; `source` names it in errors."""

    values: Mapping[str, Json]
    source: Source

    def take(self, key: str, hint: object, default: object = REQUIRED, also: tuple[str, ...] = ()) -> Json:
        """The value of `key`, of type `hint`, or that of one of its other names `also`. If it is missing or null,
        `default`, or what `default` makes of the other values. Raises `source.error` for another type, and for a
        missing key without a default.
        """
        for name in (key, *also):
            if self.values.get(name) is not None:
                return self.source.read(cast("type[Json]", hint), self.values[name], name)
        if default is REQUIRED:
            raise self.source.fault(key, "missing")
        return default(self) if callable(default) else default


@dataclass(frozen=True)
class Field:
    """The `key` of config.json that says what some settings of ours say.

    `write` gives its value for a configuration. `read` gives the settings, from a value of type `hint` and the other
    values. `default` is what the host assumes without the key: a value, or what it makes of the others. `also` are
    other names that the key has in files of other releases.
    """

    key: str
    hint: object
    write: Callable[[RunConfig], Json]
    read: Callable[[Json, Reading], Settings]
    default: object = REQUIRED
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fixed:
    """The `key` of config.json whose value is always `value`. `default` is what the host assumes without the key. A
    model with another value is refused, unless it is one of `harmless`; the value `None` counts as absent.
    """

    key: str
    value: Json
    default: Json
    harmless: tuple[Json, ...] = ()


def same(
    key: str, hint: object, setting: str, default: object = REQUIRED, of: str = "", also: tuple[str, ...] = ()
) -> Field:
    """A key with the very value of `setting`. A preset may derive what the decoder uses from that setting: then `of` is
    the place in the configuration to write from.
    """
    return Field(
        key, hint, lambda config: value_at(config, of or setting), lambda value, _: {setting: value}, default, also
    )


def value_at(config: RunConfig, place: str) -> Json:
    """The value of a configuration at a dotted key."""
    return reduce(getattr, place.split("."), config)


def read_fixed(fixed: Fixed, reading: Reading) -> None:
    """Raises the error of `reading` unless config.json agrees with `fixed`."""
    found = reading.values.get(fixed.key)
    found = fixed.default if found is None else found
    if found not in (fixed.value, *fixed.harmless):
        allowed = ", ".join(map(str, (fixed.value, *fixed.harmless)))
        raise reading.source.fault(fixed.key, "our decoder does not compute this", found, allowed)
