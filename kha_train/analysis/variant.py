"""Decides which settings under `attention.` belong to the variant, in which the two runs of a fair pair may differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from kha_train.analysis.history import Meeting
from kha_train.config.build import flatten
from kha_train.config.compose import shipped
from kha_train.foreign.documents import parse_yaml

SECTION = "attention."
OF_THE_VARIANT = ("attention.base.name", "attention.base.output_gate", "attention.interaction.")


def is_variant(key: str, meeting: Meeting, changed: Collection[str]) -> bool:
    """Whether a difference in `key` belongs to the compared variants: the base, its gate and the interaction, settings
    that only one of the two bases has, and values from each run's own preset. What a run `changed` during training does
    not.
    """
    if not key.startswith(SECTION) or key in changed:
        return False
    sides = [meeting.reference.settings or {}, meeting.other.settings or {}]
    if key.startswith(OF_THE_VARIANT) or any(key not in side for side in sides):
        return True
    return all(_is_of_preset(key, side) for side in sides)


def _is_of_preset(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether the preset named in `settings` sets `key` to the value they hold."""
    values = _preset(str(settings.get("attention.name")))
    value = values.get(key.removeprefix(SECTION))
    if isinstance(value, str) and value.startswith("${"):
        value = settings.get(value[2:-1])
    return value is not None and value == settings[key]


@cache
def _preset(name: str) -> dict[str, Any]:
    """The settings of the shipped attention `name` by dotted keys, with references as written; empty for other
    names.
    """
    files = {file.stem: file for file in (shipped("configs") / "attention").glob("*.yaml")}
    if name not in files:
        return {}
    values = parse_yaml(files[name].read_bytes())
    inherited = [_preset(one) for one in values.pop("defaults", []) if isinstance(one, str)]
    return {key: value for part in (*inherited, flatten(values)) for key, value in part.items()}
