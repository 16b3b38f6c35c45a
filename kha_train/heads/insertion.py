"""Inserts an interaction between the heads of somebody else's model.

Heads interact between projection and QK-norm, so hooks on the projections are enough: no attention kernel changes, and
what decoding caches is already changed. The parameters are a module `kha` in every attention; all other names of the
model stay.
"""

# N numbers of a projection   B batch   T tokens   H heads   K head width, or 1

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .changes import Change, Home, OutputGate
from .errors import HeadsError
from .interactions import Interaction, interaction_of
from .layouts import FAMILIES, LAYOUTS, Layout, Piece, layout_of

NAME = "kha"
"""The name of what is inserted, in its attention."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Hook:
    """What a projection calls after its forward, or before it."""

    piece: Piece
    change: Change

    def after(self, projection: nn.Module, inputs: tuple[Tensor, ...], x_N: Tensor) -> Tensor:
        """The outputs of the projection with its heads changed."""
        return self.piece.changed(x_N, self.change)

    def before(self, projection: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of the projection with its heads changed."""
        return self.piece.changed(inputs[0], self.change), *inputs[1:]


class GateHook:
    """What two projections call before their forward: the one that `reads` the attention's input, and the last one,
    which comes after it.
    """

    def __init__(self, reads: str, output: Piece, gate: OutputGate) -> None:
        self.reads, self.output, self.gate = reads, output, gate
        self.gates_BTHK: Tensor | None = None

    def see(self, projection: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Compute the gates of these tokens."""
        self.gates_BTHK = self.gate(inputs[0])

    def before(self, projection: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of the last projection, each head times its gates."""
        gates_BTHK, self.gates_BTHK = self.gates_BTHK, None
        assert gates_BTHK is not None, f"{self.reads} is called first"
        return self.output.changed(inputs[0], lambda x_BTHK: x_BTHK * gates_BTHK), *inputs[1:]


class Heads(nn.ModuleDict):
    """The changes of one attention, by the kind of heads (q, k, v, output), and its output `gate`. `family` is the name
    by which its class was known, and that of its layout.
    """

    def __init__(
        self, interaction: Interaction, family: tuple[str, str], layout: Layout, home: Home, inputs: int
    ) -> None:
        changes, gate = interaction.changes(layout, home), interaction.gate(layout, inputs, home)
        super().__init__({**changes, **({} if gate is None else {"gate": gate})})
        self.interaction, self.family = interaction, family
        self.hooks = {kind: Hook(getattr(layout, kind), change) for kind, change in changes.items()}
        self.gating = None if gate is None else GateHook(layout.reads, layout.output, gate)
        self.handles: list[RemovableHandle] = []

    def attach(self, attention: nn.Module) -> None:
        """Become a part of `attention`."""
        attention.add_module(NAME, self)
        for kind, hook in self.hooks.items():
            projection = attention.get_submodule(hook.piece.projection)
            if kind == "output":
                self.handles.append(projection.register_forward_pre_hook(hook.before))
            else:
                self.handles.append(projection.register_forward_hook(hook.after))
        if self.gating is not None:
            reader, last = (
                attention.get_submodule(name) for name in (self.gating.reads, self.gating.output.projection)
            )
            self.handles.append(reader.register_forward_pre_hook(self.gating.see))
            self.handles.append(last.register_forward_pre_hook(self.gating.before))

    def detach(self, attention: nn.Module) -> None:
        """Leave `attention` as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        delattr(attention, NAME)


class Inserted(NamedTuple):
    """An attention of a model, by its name in it, and what is inserted there."""

    name: str
    attention: nn.Module
    heads: Heads


def insert(
    model: Model,
    interaction: str,
    *,
    layouts: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Model:
    """Insert `kha_mlp`, `kha_linear`, `kha_gate`, `mea` or `gated` into every attention of `model`, in place, and
    return it.

    Its logits stay bit-equal, except with MEA's norm and an output gate. New parameters have device and dtype of the
    projections' weights (or `dtype`). `options`: `projections` and `share` of KHA, `compose` and `head_norm` of MEA,
    `output_gate` of all. `layouts` names the layout of attention classes that are not in `FAMILIES`. Insert before
    optimiser, engine or compiler see the model.

    Raises HeadsError, and leaves the model as it was, if no attention is known, one is not laid out as expected, an
    interaction cannot or must not be inserted, or an option is wrong.
    """
    for one in planned(model, interaction_of(interaction, options), FAMILIES | dict(layouts or {}), dtype):
        one.heads.attach(one.attention)
    return model


def planned(
    model: nn.Module, interaction: Interaction, layouts: Mapping[str, str], dtype: torch.dtype | None = None
) -> list[Inserted]:
    """Everything to insert into `model`, which is not changed. Raises as `insert`."""
    _check_model(model)
    if strange := set(layouts.values()) - LAYOUTS.keys():
        raise HeadsError(f"layout {min(strange)[:80]!r}: one of {', '.join(LAYOUTS)}")
    plan, owners = [], dict[int, str]()
    for name, attention in model.named_modules():
        known = [called for called in _names(attention) if called in layouts]
        if not known:
            continue
        family = known[0], layouts[known[0]]
        layout = layout_of(attention, family[1])
        if reason := interaction.refuses(layout):
            raise HeadsError(f"{interaction.name} cannot be inserted into {name}: {reason}")
        for projection in {piece.projection for piece in layout[:4]}:
            owner = owners.setdefault(id(attention.get_submodule(projection)), name)
            if owner != name:
                raise HeadsError(f"{name} and {owner} share one module as {projection}; each needs its own")
        inputs: Any = attention.get_submodule(layout.reads).in_features
        home = _home(attention, layout, dtype)
        plan.append(Inserted(name, attention, Heads(interaction, family, layout, home, inputs)))
    if not plan:
        raise HeadsError(_nothing_known(model, layouts))
    return plan


def inserted(model: nn.Module) -> list[Inserted]:
    """What was inserted into `model`. Raises HeadsError if that is nothing."""
    found = list(_inserted(model))
    if not found:
        raise HeadsError(f"nothing is inserted into {type(model).__name__}")
    return found


def whole(tensor: Tensor) -> bool:
    """Whether a parameter is here as floating-point numbers: not on meta, not quantised, and neither a DTensor nor left
    empty by an engine that shards it.
    """
    here = tensor.device.type != "meta" and not hasattr(tensor, "full_tensor")
    return here and tensor.is_floating_point() and tensor.numel() > 0


def _inserted(model: nn.Module) -> Iterator[Inserted]:
    for name, module in model.named_modules():
        if isinstance(heads := module._modules.get(NAME), Heads):
            yield Inserted(name, module, heads)


def _names(module: nn.Module) -> tuple[str, str]:
    """What its class may be called: with its module, and alone."""
    name = type(module).__name__
    return f"{type(module).__module__}.{name}", name


def _check_model(model: nn.Module) -> None:
    """Raises HeadsError for a model that has heads, or has been compiled."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == NAME:
            raise HeadsError(f"{name} is already inserted; fold it first, or begin with the stock model")
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise HeadsError(f"{name or 'the model'} is compiled; insert first, then compile")


def _home(attention: nn.Module, layout: Layout, dtype: torch.dtype | None) -> Home:
    weight = attention.get_submodule(layout.v.projection).get_parameter("weight")
    if dtype is None and not weight.is_floating_point():
        raise HeadsError(f"weights of {weight.dtype} are no example for new parameters; give dtype=")
    return Home(weight.device, dtype or weight.dtype)


def _nothing_known(model: nn.Module, layouts: Mapping[str, str]) -> str:
    names = {type(module).__name__ for module in model.modules()}
    has = ", ".join(sorted(name for name in names if "attention" in name.lower())) or "no class named after attention"
    return (
        f"no known attention in {type(model).__name__}, which has {has}; known are {', '.join(layouts)}; for another "
        f"class name its layout, layouts={{'MyAttention': 'transformers'}} (one of {', '.join(LAYOUTS)})"
    )
