"""Heads that `kha_heads` saved beside a stock model -> the interaction of ours that they are.

They are data like the rest of the directory: the settings have fixed keys and plain values, and the tensors are read as
those of the model are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypedDict

from kha_train.errors import CheckpointError
from kha_train.export.directory import StoredTensor, headers, read_json
from kha_train.export.fields import Settings
from kha_train.export.heads_files import KNOCKING, place_of
from kha_train.export.links import Link, one
from kha_train.export.reading import INTERACTION
from kha_train.foreign.files import SMALL
from kha_train.foreign.typed import Match, Source

SETTINGS, TENSORS = "kha_heads.json", "kha_heads.safetensors"
PRESETS = {theirs: ours for ours, theirs in KNOCKING.items()} | {"mea": "explicit", "gated": "none"}
"""The name of an interaction of `kha_heads` -> ours."""
Word = Annotated[str, Match("[a-z]{1,20}")]


class Options(TypedDict, total=False):
    """The options that any of them has."""

    projections: list[Word]
    share: Word
    compose: list[Word]
    head_norm: bool
    output_gate: Word


class Saved(TypedDict):
    """`kha_heads.json`."""

    format: Literal["kha-heads"]
    version: Literal[1]
    interaction: str
    options: Options
    sha256: Annotated[str, Match("[0-9a-f]{64}")]


class Heads(NamedTuple):
    """The interaction as settings of ours, and its tensors by their names in the file."""

    settings: Settings
    tensors: dict[str, StoredTensor]

    def links(self) -> list[Link]:
        """Which parameters of ours they are; those of an unknown place are left out."""
        return [one(place, name) for name in self.tensors if (place := place_of(name)) is not None]


def read_heads(path: Path) -> Heads:
    """The heads in the model directory `path`, empty without any. Raises CheckpointError for files that are damaged, of
    an unknown format, or contradict each other.
    """
    values = read_json(path, SETTINGS, SMALL)
    if values is None:
        return Heads({}, {})
    source = Source(str(path / SETTINGS), CheckpointError, "save the heads again with kha_heads")
    saved = source.read(Saved, values)
    if saved["interaction"] not in PRESETS:
        raise source.fault("interaction", "is not known", saved["interaction"], ", ".join(PRESETS))
    if unknown := sorted(saved["options"].keys() - Options.__annotations__):
        raise source.fault("options", "holds an unknown one", unknown[0], ", ".join(Options.__annotations__))
    tensors = headers(path, TENSORS)
    with (path / TENSORS).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != saved["sha256"]:
            raise source.fault("sha256", f"is not that of {TENSORS}", saved["sha256"])
    homes = {"output_gate": "attention.base"}
    options = {f"{homes.get(key, 'attention.interaction')}.{key}": value for key, value in saved["options"].items()}
    return Heads({INTERACTION: PRESETS[saved["interaction"]], **options}, tensors)
