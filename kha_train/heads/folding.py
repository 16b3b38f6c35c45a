"""Multiplies a linear interaction into the weights, which leaves the stock model."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from .errors import HeadsError
from .insertion import Hook, Inserted, Model, inserted, whole


def fold(model: Model) -> Model:
    """Multiply what was inserted into the weights of `model`, in place, and return it: the stock model, without `kha`,
    that computes the same up to rounding (KHA eq 8). Products are computed in fp64.

    Raises HeadsError, and leaves the model as it was, if the interaction is not linear or a weight cannot be changed:
    sharded, quantised, on meta, or shared with another module.
    """
    layers = inserted(model)
    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for layer in layers:
        if layer.heads.gating is not None:
            raise HeadsError(f"the output gate of {layer.name} reads activations, so no weights are equal to it")
        for hook in layer.heads.hooks.values():
            _check(layer, hook, users)
    for layer in layers:
        for hook in layer.heads.hooks.values():
            _multiply(layer.attention.get_submodule(hook.piece.projection), hook)
        layer.heads.detach(layer.attention)
    return model


def _check(layer: Inserted, hook: Hook, users: Counter[int]) -> None:
    """Raises HeadsError if `hook` cannot be folded."""
    if not hook.change.linear:
        what = f"{layer.heads.interaction.name} of {layer.name} ({type(hook.change).__name__})"
        raise HeadsError(f"{what} is not linear, so no weights are equal to it; keep it with save and load")
    projection = layer.attention.get_submodule(hook.piece.projection)
    where = f"{layer.name}.{hook.piece.projection}"
    if unknown := {name for name, _ in projection.named_parameters()} - {"weight", "bias"}:
        raise HeadsError(f"{where} has {min(unknown)} beside its weight; merge adapters and parametrisations first")
    for name, weight in projection.named_parameters():
        if not whole(weight) or weight.numel() != _elements(projection, hook, name):
            raise HeadsError(f"{where}.{name} is not a whole floating-point tensor here; gather or dequantise it first")
        if users[id(weight)] > 1:
            raise HeadsError(f"{where}.{name} is shared with another module, which folding would change; untie it")
    for name, matrix in hook.change.named_parameters():
        if not whole(matrix):
            raise HeadsError(f"{layer.name}.kha {name} is not a whole tensor here; gather it first")


@torch.no_grad()
def _multiply(projection: nn.Module, hook: Hook) -> None:
    """A linear map of outputs is the same map of every column of the weight, and of the bias."""
    for weight in projection.parameters():
        columns = weight.double().reshape(len(weight), -1).T
        weight.copy_(hook.piece.changed(columns, hook.change).T.reshape(weight.shape))


def _elements(projection: nn.Module, hook: Hook, name: str) -> int:
    # torch says of an attribute of a module only that it is a tensor or a module.
    inputs: int = projection.in_features if name == "weight" else 1  # type: ignore[assignment]
    return hook.piece.outputs * inputs
