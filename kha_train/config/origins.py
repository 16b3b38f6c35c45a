"""Where each setting of a composed configuration was set: command line, a line of a preset, or a default of the schema.

Hydra says which files it merges, in which order (`compose.parts`); the last one that has a key decides its value, and
what is typed overrides them all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from kha_train.config.build import flatten, to_plain, variant_class
from kha_train.config.compose import PACKAGE, Part, parts, shipped
from kha_train.config.schema import RunConfig
from kha_train.foreign.documents import Json, yaml_lines


class Declared(NamedTuple):
    """The field of a setting: the dataclass that has it, its declaration, and its type."""

    owner: type
    entry: Field[object]
    hint: object

    @property
    def introduced_by(self) -> type:
        """The class among `owner` and its parents that declares the field."""
        return next(cls for cls in self.owner.__mro__ if self.entry.name in vars(cls).get("__annotations__", {}))


class Origin(NamedTuple):
    """`where` a setting was set, the text of the value there if it is not the value itself (`${model.layers}`), what
    chose the file, and the comments beside the value and at the top of the file.
    """

    where: str
    written: str = ""
    chosen_by: str = ""
    comments: tuple[str, ...] = ()


def origins(config: RunConfig, overrides: Sequence[str]) -> dict[str, Origin]:
    """The origin of each setting of `config`, which is composed of `overrides`, by dotted keys."""
    files = [(part, part.path.read_text(encoding="utf-8")) for part in reversed(parts(overrides))]
    lines = [(part, text, yaml_lines(text)) for part, text in files]
    found = {}
    for key, value in flatten(to_plain(config)).items():
        typed = _typed(key, overrides)
        found[key] = Origin(f"command line: {typed}") if typed else _in_files(key, value, lines, overrides)
    return found


def declared(key: str, config: RunConfig) -> Declared | None:
    """The declaration of the setting `key` in the variants that `config` chooses; None where there is none."""
    owner: type = RunConfig
    values: Json = to_plain(config)
    names = key.split(".")
    for depth, name in enumerate(names, start=1):
        hints: dict[str, Any] = get_type_hints(owner)
        entry = next((entry for entry in fields(owner) if entry.name == name), None)
        if entry is None:
            return None
        if depth == len(names):
            return Declared(owner, entry, hints[name])
        if not (isinstance(hints[name], type) and is_dataclass(hints[name])):
            return None
        values = values[name]
        owner = variant_class(hints[name], values, ".".join(names[:depth]))
    return None


def line_of(declaration: Declared) -> str:
    """`file:line` of the declaration of a field."""
    cls = declaration.introduced_by
    source, first = inspect.getsourcelines(cls)
    at = next(n for n, line in enumerate(source) if re.match(rf"\s+{declaration.entry.name}: ", line))
    return f"{_shown(Path(inspect.getfile(cls)))}:{first + at}"


def _typed(key: str, overrides: Sequence[str]) -> str:
    """The last override that sets `key` or a section around it, or that names the preset which `attention.name` is."""
    for override in reversed(overrides):
        name = override.partition("=")[0].lstrip("+~")
        if key == name or (key.startswith(f"{name}.") and override.partition("=")[2].startswith("{")):
            return override
    chosen = [text for text in overrides if text.partition("=")[0] == "attention"]
    return chosen[-1] if chosen and key == "attention.name" else ""


def _in_files(
    key: str, value: Any, files: list[tuple[Part, str, dict[str, tuple[int, str]]]], overrides: Sequence[str]
) -> Origin:
    for part, text, lines in files:
        inner = key.removeprefix(f"{part.section}.") if part.section else key
        if (part.section and inner == key) or inner not in lines:
            continue
        line, written = lines[inner]
        head = " ".join(found.lstrip("# ") for found in text.splitlines() if found.startswith("# "))
        comment = re.search(r"\s#\s*(.*)$", text.splitlines()[line - 1])
        return Origin(
            f"{_shown(part.path)}:{line}",
            written if "${" in written or (key == "run.name" and written != value) else "",
            _chooser(part, overrides),
            tuple(filter(None, (comment[1] if comment else "", head.removeprefix("@package _global_ ")))),
        )
    return Origin("")


def _chooser(part: Part, overrides: Sequence[str]) -> str:
    """What chose the file: what was typed, or another file; "" for the main file, which is always read."""
    group = part.path.relative_to(shipped("configs")).parent.as_posix()
    typed = [text for text in overrides if text.partition("=")[0].partition("@")[0] == group]
    if typed:
        return typed[-1]
    return "" if part.chosen_by in ("", "<root>") else f"configs/{part.chosen_by}.yaml"


def _shown(path: Path) -> str:
    """`path` from the checkout or the installed package on; a variant of other people keeps its whole path."""
    root, place = PACKAGE.parent.resolve(), path.resolve()
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place)
