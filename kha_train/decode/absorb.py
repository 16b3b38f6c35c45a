"""Multiplies an interaction permanently into the neighbouring projections: the same function without extra computation.

This is exact for interactions that are linear between a projection and its norm: KHA-Linear vanishes (KHA eq 8), and
explicit composition leaves at most its norm of the head outputs. The absorbed decoder is an ordinary one with the
simpler configuration.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kha_train.config.resolve import implementation
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.model.attention.base import Attention
from kha_train.model.decoder import Decoder, build_decoder
from kha_train.model.init import reset_buffers


def absorbed_config(config: RunConfig) -> RunConfig | None:
    """The configuration of the decoder after absorption; None when the interaction cannot be absorbed."""
    left = config.attention.interaction.absorbed(config.attention.heads())
    return None if left is None else replace(config, attention=replace(config.attention, interaction=left))


@torch.no_grad()
def absorb(decoder: Decoder) -> Decoder:
    """A decoder that computes the same function and shares all other parameters with `decoder`; `decoder` itself when
    there is nothing to absorb. Projections are multiplied in at least fp32 and keep their dtype.

    Raises ConfigError when the interaction acts on activations and cannot be absorbed.
    """
    options, config = decoder.config.attention.interaction, absorbed_config(decoder.config)
    if config is None:
        raise ConfigError(
            "acts on activations, so it cannot be absorbed into weights",
            field="attention.interaction.name",
            value=options.name,
            allowed="interactions that are linear between a projection and its norm",
        )
    if config.attention.interaction == options:
        return decoder
    state = decoder.state_dict()
    for prefix, module in decoder.named_modules():
        if isinstance(module, Attention):
            state |= folded_weights(prefix, module)
    with torch.device("meta"):
        plain = build_decoder(config, decoder.resolved._replace(interaction=implementation(config)))
    reset_buffers(plain, config.run.seed, decoder.embedding.weight.device)
    wanted = plain.state_dict().keys()
    plain.load_state_dict({name: value for name, value in state.items() if name in wanted}, assign=True)
    plain.tie_weights()
    return plain.train(decoder.training)


def folded_weights(prefix: str, attention: Attention) -> dict[str, Tensor]:
    """The weights of the projections of `attention`, by full names, with what its interaction does multiplied in; those
    it does nothing to as they are. `prefix` is the full name of the module."""
    maps = attention.interaction.linear_maps()
    return {
        f"{prefix}.{name}.weight": getattr(attention, name).folded(getattr(maps, projection))
        for projection, name in attention.folded.items()
    }
