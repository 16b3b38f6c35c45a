"""Interactions that act on activations, in an export: the files that `kha_heads` writes beside a stock model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export import hugging_face
from kha_train.export.links import Part
from kha_train.export.shards import Read
from kha_train.foreign.documents import Json
from kha_train.heads import HeadsError, insert, save
from kha_train.variants.explicit import ExplicitOptions
from kha_train.variants.interactions import KnockingOptions

KNOCKING = {"knocking_linear": "kha_linear", "knocking_mlp": "kha_mlp", "knocking_gate": "kha_gate"}
"""Our name of an interaction -> that of `kha_heads`."""
_PLACE = re.compile(r"model\.layers\.([0-9]+)\.self_attn\.kha\.(\w+)\.(\w+)")


class Insertion(NamedTuple):
    """An interaction as `kha_heads.insert` takes it."""

    name: str
    options: dict[str, Any]


def insertion_of(config: RunConfig) -> Insertion | None:
    """The interaction and output gate of an exported decoder, None without either.

    Raises ConfigError for an interaction that `kha_heads` lacks.
    """
    options, shape = config.attention.interaction, config.attention.heads()
    output_gate = config.attention.base.output_gate
    gate = {} if output_gate == "none" else {"output_gate": output_gate}
    if not options.parameters(shape) + options.frozen_numbers(shape):
        return Insertion("gated", gate) if gate else None
    if isinstance(options, KnockingOptions) and options.name in KNOCKING:
        return Insertion(KNOCKING[options.name], {"projections": options.projections, "share": options.share, **gate})
    if isinstance(options, ExplicitOptions) and not (problem := _unlike(options, config)):
        return Insertion("mea", {"compose": options.compose, "head_norm": options.head_norm, **gate})
    reason = problem if isinstance(options, ExplicitOptions) else f"kha_heads has no {options.name}"
    raise ConfigError(
        f"{reason}, so no model class of transformers computes it",
        field="attention.interaction.name",
        value=options.name,
        allowed="none, knocking_linear, knocking_mlp, knocking_gate, explicit",
        fix="`kha eval` and `kha generate` work on the run itself",
    )


def _unlike(options: ExplicitOptions, config: RunConfig) -> str | None:
    """Why explicit composition has no place in a stock model, or None."""
    if options.mix_after_rope:
        return "keys are composed after norm and rotation"
    others = options.component_heads_by_layer or options.component_heads not in (0, config.attention.heads().kv_heads)
    if options.compose and others:
        return "heads are composed of another number of components, unless they are absorbed"
    return None


def write_heads(directory: Path, values: dict[str, Json], insertion: Insertion, read: Read) -> None:
    """Write what is inserted into the model that config.json `values` describes; `read` gives the tensors of ours.

    Raises ConfigError when it cannot be inserted there, OSError.
    """
    model = hugging_face.bare(values)
    try:
        insert(model, insertion.name, **insertion.options)
    except HeadsError as error:
        raise ConfigError(str(error), field="attention.interaction.name", fix="export with --absorb") from error
    for name, module in list(model.named_modules()):
        for local in list(module._parameters):
            if place := place_of(f"{name}.{local}"):
                module.register_parameter(local, nn.Parameter(read(Part(place)), requires_grad=False))
    save(model, directory)


def place_of(name: str) -> str | None:
    """Our name of a parameter that `kha_heads` inserted into a model of transformers; None for any other."""
    found = _PLACE.fullmatch(name)
    if found is None:
        return None
    # Which kind of heads it changes, and what it is called there.
    layer, kind, parameter = found.groups()
    if kind == "gate":
        return f"blocks.{layer}.attention.gate.weight"
    names = {"map": f"maps.{kind}", "across": f"compose.{kind}", "gain": "norm"}
    return f"blocks.{layer}.attention.interaction.{names.get(parameter, f'maps.{kind}.{parameter}')}.weight"
