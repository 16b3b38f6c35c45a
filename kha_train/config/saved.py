"""Completes a configuration saved by an older release with settings added since.

In a configuration saved before a field existed, the field has its declared earlier value: its default, or the `before`
in its metadata if today's default behaves differently:

    warmth: float = field(default=1.0, metadata={"before": 0.0})

So every older checkpoint resumes and every older run compares. A field without a default needs a `before`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, TypedDict, get_args, get_origin, get_type_hints

from kha_train.config.build import plain, to_plain, variant_class
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.foreign.typed import LARGEST, Count, Length, Range

BEFORE = "before"
"""The metadata key for a field's value from before the field existed, if it differs from the default."""


class SavedRun(TypedDict, total=False):
    """The fields of `run` that are read without building the configuration. `completed` makes the name text again."""

    name: str | float
    seed: int | None
    steps: Count


class SavedVariant(TypedDict, total=False):
    """The name that chooses the settings of a base or an interaction."""

    name: str


class SavedAttention(TypedDict, total=False):
    """The fields of `attention` that are read. `completed` makes the name text again."""

    name: str | float
    base: SavedVariant
    interaction: SavedVariant


class SavedPhase(TypedDict):
    """A phase of the data mixture."""

    start_sample: Count


Rows = Annotated[int, Range(1, LARGEST)]


class SavedBatchChange(TypedDict):
    """Another batch size from a step on."""

    start_step: Count
    global_batch_size: Rows


class SavedData(TypedDict, total=False):
    """The fields of `data` that are read."""

    global_batch_size: Rows
    batch_schedule: list[SavedBatchChange] | None
    sources: list[dict[str, Any]] | None
    phases: list[SavedPhase]
    skip_windows: list[Annotated[list[Count], Length(2)]]


class SavedValidation(TypedDict, total=False):
    """What is read of `validation`."""

    sets: list[dict[str, Any]]


class SavedEvaluation(TypedDict, total=False):
    """What is read of `evaluation`."""

    tasks: list[dict[str, Any]]


class SavedConfig(TypedDict, total=False):
    """A saved configuration of any release, as far as it is read as plain values; all else may be anything."""

    run: SavedRun
    attention: SavedAttention
    data: SavedData
    validation: SavedValidation
    evaluation: SavedEvaluation


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The saved configuration `values`, with each missing setting at its declared earlier value.

    Existing values stay unchanged, including unknown keys and wrong types: readers judge those. A setting without a
    declared earlier value stays absent.
    """
    return _complete(RunConfig, values)


def _complete(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        cls = variant_class(cls, values, "")
    except ConfigError:
        # A variant that this release does not know, so its settings are unknown.
        return dict(values)
    filled = dict(values)
    hints = get_type_hints(cls)
    for entry in fields(cls):
        if entry.name not in filled:
            filled |= _earlier(entry, hints[entry.name])
        elif (text := _text_again(hints[entry.name], filled[entry.name])) is not None:
            filled[entry.name] = text
        elif (section := _section(hints[entry.name])) is not None:
            filled[entry.name] = _descend(section, filled[entry.name])
    return filled


def _text_again(hint: Any, value: Any) -> Any:
    """The text "nan", "inf" or "-inf", which older releases read back as numbers, where the schema has text."""
    if hint == str and isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if hint == tuple[str, ...] and isinstance(value, list) and any(isinstance(item, float) for item in value):
        return [item if (text := _text_again(str, item)) is None else text for item in value]
    return None


def _descend(section: type, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _complete(section, value)
    if isinstance(value, list):
        return [_descend(section, item) for item in value]
    return value


def _earlier(entry: Field[Any], hint: Any) -> dict[str, Any]:
    """{name: the declared earlier value}; empty where none is declared."""
    if BEFORE in entry.metadata:
        return {entry.name: plain(entry.metadata[BEFORE])}
    if entry.default is not MISSING:
        return {entry.name: _as_saved(entry.default)}
    if entry.default_factory is not MISSING:
        return {entry.name: _as_saved(entry.default_factory())}
    return {entry.name: _complete(hint, {})} if is_dataclass(hint) and isinstance(hint, type) else {}


def _as_saved(value: Any) -> Any:
    return to_plain(value) if is_dataclass(value) and not isinstance(value, type) else plain(value)


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, alone or as the items of a tuple; None for plain values."""
    candidates = [hint, *(get_args(hint) if get_origin(hint) is tuple else ())]
    return next((one for one in candidates if isinstance(one, type) and is_dataclass(one)), None)
