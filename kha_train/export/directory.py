"""Reads a model directory that somebody else wrote: `config.json` and safetensors files.

Such a directory is data. Only JSON and safetensors are parsed, no file outside the directory is opened, and no class,
function or address that it names is used. Pickled weights are never opened.
"""

# R rows   ... the other dimensions of a tensor

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kha_train.errors import CheckpointError, ConfigError
from kha_train.foreign.documents import Json, parse_json
from kha_train.foreign.files import SMALL, read_regular
from kha_train.foreign.typed import Source, short

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = ("F32", "BF16", "F16")
"""Element types that fp32 represents exactly."""
MAX_INDEX_BYTES = 256 * 2**20
MAX_FILES = 10_000
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_ADDED = "adapter_config.json"
"""The file that announces weights of PEFT beside those of the model."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class StoredTensor(NamedTuple):
    """A tensor in a file of the directory: its safetensors dtype name and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelDirectory:
    """The content of `config.json`, and every tensor of the weights by name. `passed_over` are files with pickled
    weights, which stay closed.
    """

    path: Path
    config: dict[str, Json]
    tensors: Mapping[str, StoredTensor]
    passed_over: tuple[str, ...]

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """Rows `first` .. `first + rows` of a tensor (all without `rows`), [R, ...] in fp32 on the CPU.

        Raises CheckpointError when they cannot be read, or hold a value that is not finite.
        """
        stored = self.tensors[name]
        last = stored.shape[0] if rows is None else first + rows
        try:
            # Opened anew each time: pages of a mapped file count as memory until it is closed.
            with safe_open(stored.file, framework="pt") as file:
                part = file.get_slice(name)[first:last]
                values = torch.empty(part.shape, dtype=torch.float32).copy_(part)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name!r} cannot be read: {error}", field=str(stored.file)) from error
        # Unlike `isfinite`, this makes no copies; it is NaN if any value is.
        if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
            problem = f"tensor {name!r} holds a value that is not finite"
            raise CheckpointError(problem, field=str(stored.file), allowed="finite numbers")
        return values


def open_directory(path: Path) -> ModelDirectory:
    """The model directory `path`. Reads its JSON and the headers of its weights, and no weight.

    Raises ConfigError when it is no such directory, has no weights in safetensors, or names code to run;
    CheckpointError for a damaged file, and for a name or a link that leaves the directory.
    """
    if not path.is_dir():
        raise ConfigError("no such directory", field="DIR", value=str(path), allowed="a model directory of safetensors")
    names = sorted(os.listdir(path))
    config = read_json(path, CONFIG_NAME, SMALL)
    if config is None:
        problem = f"holds no {CONFIG_NAME}"
        raise ConfigError(problem, field="DIR", value=str(path), allowed="a model directory of transformers")
    if code := sorted(key for key in config if "auto_map" in key or key == "custom_pipelines"):
        raise ConfigError(
            "names code of its own, and an import runs no code of a model",
            field=f"{path / CONFIG_NAME} {code[0]}",
            value=short(config[code[0]]),
            fix="if stock transformers compute this model too, remove the entry from a copy",
        )
    if _ADDED in names:
        raise ConfigError(
            "announces weights that change what the stock model computes, and they are not imported",
            field=str(path / _ADDED),
            fix="merge them into the model first, or import a copy without the file",
        )
    pickles = tuple(name for name in names if name.endswith(_PICKLES))
    return ModelDirectory(path, config, _tensors(path, names, pickles), pickles)


def read_inside(path: Path, name: str, limit: int) -> bytes | None:
    """The bytes of the file `name` of the directory `path`; None when there is none. Raises CheckpointError when it has
    more than `limit` bytes, is no file, or is a link that leaves the directory."""
    place = path / name
    if os.path.lexists(place):
        _check_stays(path, place)
    return read_regular(place, limit, CheckpointError)


def read_json(path: Path, name: str, limit: int) -> dict[str, Json] | None:
    """The JSON object in the file `name`; None when there is none. Raises CheckpointError for anything else."""
    raw = read_inside(path, name, limit)
    if raw is None:
        return None
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"cannot be read as JSON: {short(str(error))}", field=str(path / name)) from error
    if not isinstance(values, dict):
        raise CheckpointError("wrong type", field=str(path / name), value=short(values), allowed="an object")
    return values


def _tensors(path: Path, names: list[str], pickles: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Every tensor of the weights, by name. Raises ConfigError when there are none, CheckpointError when the files and
    their index contradict each other."""
    single, indexed = SINGLE_NAME in names, INDEX_NAME in names
    if single == indexed:
        there = f"{SINGLE_NAME} and {INDEX_NAME}" if single else ", ".join(pickles) or "no weights"
        raise ConfigError(
            "which of its weights count is not clear" if single else "has no weights that can be read safely",
            field="DIR",
            value=f"{path}: {short(there)}",
            allowed=f"{SINGLE_NAME}, or {INDEX_NAME} and the files it names",
            fix="convert them to safetensors where they come from; pickled weights can run code" if pickles else None,
        )
    if single:
        return headers(path, SINGLE_NAME)
    index, where = read_json(path, INDEX_NAME, MAX_INDEX_BYTES), str(path / INDEX_NAME)
    listed = Source(where, CheckpointError).read(dict[str, str], (index or {}).get("weight_map"), "weight_map")
    files = sorted(set(listed.values()))
    if len(files) > MAX_FILES:
        raise CheckpointError("names too many files", field=where, value=len(files), allowed=f"at most {MAX_FILES}")
    found: dict[str, StoredTensor] = {}
    for file in files:
        stored = headers(path, file, where)
        expected = {name for name, place in listed.items() if place == file}
        if wrong := sorted(stored.keys() ^ expected):
            problem = "holds a tensor that the index does not place there" if wrong[0] in stored else "lacks a tensor"
            raise CheckpointError(problem, field=str(path / file), value=short(wrong[0]), allowed=f"what {where} says")
        found |= stored
    return found


def headers(path: Path, name: str, where: str | None = None) -> dict[str, StoredTensor]:
    """The tensors in the file `name`, which the index `where` lists. Raises CheckpointError for a name that leaves the
    directory, and for a file that is missing, damaged, or holds numbers of other types."""
    if not _FILE_NAME.fullmatch(name):
        problem, allowed = "names a file that is not one of this directory", "bare names that end in .safetensors"
        raise CheckpointError(problem, field=where, value=short(name), allowed=allowed)
    place = path / name
    if not os.path.lexists(place):
        raise CheckpointError("missing", field=str(place), allowed="a file that the index names")
    _check_stays(path, place)
    found = {}
    try:
        with safe_open(place, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                part = file.get_slice(key)
                found[key] = StoredTensor(place, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        problem = f"cannot be read as safetensors: {short(str(error))}"
        raise CheckpointError(problem, field=str(place), fix="copy it again from where it comes") from error
    for key, stored in found.items():
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {short(key)!r} holds numbers of a type that is not taken over",
                field=str(place),
                value=stored.dtype,
                allowed=", ".join(DTYPES),
            )
    return found


def _check_stays(path: Path, place: Path) -> None:
    """Raises CheckpointError unless `place` is a regular file of the directory `path`, or a link to one."""
    if Path(os.path.realpath(place)).parent != Path(os.path.realpath(path)):
        raise CheckpointError(
            "is a link that leaves the directory",
            field=str(place),
            value=os.readlink(place) if place.is_symlink() else None,
            fix="import a copy that follows links (cp -rL)",
        )
    if not place.is_file():
        raise CheckpointError("is no regular file", field=str(place))
