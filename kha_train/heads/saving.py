"""Saves what was inserted into a model as two files beside the model's own: `kha_heads.safetensors` with the tensors,
and `kha_heads.json`, which says what they are.

A directory may come from anybody. The JSON has fixed keys and plain values, no name in it is imported or opened, and
nothing is changed before both files and every name and shape have been checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HeadsError
from .insertion import NAME, Inserted, Model, inserted, planned, whole
from .interactions import Interaction, interaction_of

SETTINGS, TENSORS = "kha_heads.json", "kha_heads.safetensors"
VERSION = 1
"""Of the format, in the settings."""
MOST_SETTINGS = 2**20
"""Limit on the size of the settings, in bytes."""


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write what was inserted into `model` into `directory`, which is made if missing; earlier such files are replaced.
    Where several processes have the model, one of them saves.

    Raises HeadsError if nothing is inserted, or a parameter is not here as a whole.
    """
    from safetensors.torch import save_file

    layers = inserted(model)
    tensors = {name: _checked(name, tensor) for layer in layers for name, tensor in _tensors(layer).items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    beside = folder / f".{TENSORS}.new"
    save_file(tensors, beside)
    settings = _settings(layers) | {"sha256": _sha256(beside)}
    os.replace(beside, folder / TENSORS)
    beside = folder / f".{SETTINGS}.new"
    beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / SETTINGS)


def load(model: Model, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Model:
    """Insert into the stock `model`, in place, what `save` wrote into `directory`, and return it. Parameters have
    device and dtype of the projections' weights (or `dtype`); on a model on meta they are on the CPU.

    Raises HeadsError, and leaves the model as it was, if a file is missing, damaged or not of this format, or does not
    fit the model.
    """
    folder = Path(directory)
    interaction, layouts, sha256 = _read_settings(folder / SETTINGS)
    layers = planned(model, interaction, layouts, dtype)
    tensors = _read_tensors(folder / TENSORS, sha256, {n: t for layer in layers for n, t in _tensors(layer).items()})
    for layer in layers:
        for name, fresh in layer.heads.named_parameters():
            value = tensors[_full_name(layer, name)].to(fresh.dtype)
            owner, _, local = name.rpartition(".")
            home = "cpu" if fresh.device.type == "meta" else fresh.device
            setattr(layer.heads.get_submodule(owner), local, nn.Parameter(value.to(home)))
        layer.heads.attach(layer.attention)
    return model


def _full_name(layer: Inserted, name: str) -> str:
    return ".".join(part for part in (layer.name, NAME, name) if part)


def _tensors(layer: Inserted) -> dict[str, Tensor]:
    return {_full_name(layer, name): value.detach() for name, value in layer.heads.named_parameters()}


def _checked(name: str, tensor: Tensor) -> Tensor:
    """Raises HeadsError for a parameter of which this process has a share."""
    if not whole(tensor):
        raise HeadsError(f"{name} is not a whole tensor here; gather it first")
    return tensor.cpu().contiguous()


def _settings(layers: list[Inserted]) -> dict[str, Any]:
    interaction = layers[0].heads.interaction
    return {
        "format": "kha-heads",
        "version": VERSION,
        "interaction": interaction.name,
        "options": interaction.options(),
        "layouts": dict(layer.heads.family for layer in layers),
    }


def _read_settings(path: Path) -> tuple[Interaction, dict[str, str], str]:
    """The interaction, the layouts of attention classes and the hash of the other file."""
    try:
        with _regular(path).open("rb") as file:
            settings = json.loads(file.read(MOST_SETTINGS + 1))
    except (ValueError, RecursionError) as error:
        raise HeadsError(f"{path} is not JSON: {str(error)[:200]}") from error
    keys = {"format": str, "version": int, "interaction": str, "options": dict, "layouts": dict, "sha256": str}
    if not isinstance(settings, dict) or {key: type(value) for key, value in settings.items()} != keys:
        raise HeadsError(f"{path} does not have exactly the keys {', '.join(keys)}, each of its type")
    if (settings["format"], settings["version"]) != ("kha-heads", VERSION):
        raise HeadsError(f"{path} is not of format kha-heads, version {VERSION}")
    if not all(isinstance(layout, str) for layout in settings["layouts"].values()):
        raise HeadsError(f"{path}: layouts are names of layouts by names of classes")
    return interaction_of(settings["interaction"], settings["options"]), settings["layouts"], settings["sha256"]


def _read_tensors(path: Path, sha256: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of these names and shapes."""
    from safetensors import SafetensorError, safe_open

    if _sha256(_regular(path)) != sha256:
        raise HeadsError(f"{path} is not the file that {SETTINGS} describes: its SHA-256 differs")
    try:
        with safe_open(path, "pt") as file:
            if unlike := sorted(file.keys() ^ expected.keys()):
                raise HeadsError(f"{path} does not fit the model: {unlike[0][:200]} is only in one of them")
            for name, fresh in expected.items():
                if (shape := file.get_slice(name).get_shape()) != list(fresh.shape):
                    raise HeadsError(f"{path} does not fit the model: {name} is {shape}, not {list(fresh.shape)}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise HeadsError(f"{path} is not a whole safetensors file: {str(error)[:200]}") from error
    if strange := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise HeadsError(f"{path}: {strange[0]} is of {tensors[strange[0]].dtype}, not of floating-point numbers")
    return tensors


def _regular(path: Path) -> Path:
    """Raises HeadsError unless `path` is a file: a FIFO would be waited for."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise HeadsError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise HeadsError(f"{path} is not a regular file")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
