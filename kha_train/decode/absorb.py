"""Multiplies an interaction permanently into the neighbouring projections: the same function without extra computation.

This is exact for interactions that are linear between a projection and its norm: KHA-Linear vanishes (KHA eq 8), and
explicit composition leaves at most its norm of the head outputs. The absorbed decoder is an ordinary one with the
simpler configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.resolve import Resolved, implementation
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.model.attention.base import Attention
from kha_train.model.decoder import Decoder, build_decoder, lay_out_decoder
from kha_train.model.init import reset_buffers
from kha_train.variants.optimizer import MASTER


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
    return rebuilt(decoder, config, decoder.resolved._replace(interaction=implementation(config)), state)


def rebuilt(decoder: Decoder, config: RunConfig, resolved: Resolved, state: Mapping[str, Tensor]) -> Decoder:
    """The decoder of `config` with the tensors of `state` that it has, on the device and in the mode of `decoder`."""
    with torch.device("meta"):
        other = build_decoder(config, resolved)
    reset_buffers(other, config.run.seed, decoder.embedding.weight.device)
    wanted = other.state_dict().keys()
    other.load_state_dict({name: value for name, value in state.items() if name in wanted}, assign=True)
    other.tie_weights()
    return other.train(decoder.training)


class AbsorbedWeights:
    """The projections of the model of `config` with its interaction multiplied in, from the masters of `checkpoint`.
    One layer is held at a time; `names` are the weights that change.
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._buffers = checkpoint.buffers()
        self._owners: dict[str, tuple[str, Attention]] = {}
        for prefix, module in lay_out_decoder(config).named_modules():
            if isinstance(module, Attention):
                maps = module.interaction.linear_maps()
                names = [name for kind, name in module.folded.items() if getattr(maps, kind) is not None]
                self._owners |= {f"{prefix}.{name}.weight": (prefix, module) for name in names}
        self.names = set(self._owners)
        self._layer, self._weights = "", dict[str, Tensor]()

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """The weight, flattened, in fp32 on the CPU."""
        prefix, module = self._owners[name]
        if prefix != self._layer:
            module.to_empty(device="cpu")
            for local, parameter in module.named_parameters():
                full = f"{prefix}.{local}"
                parameter.copy_(self._checkpoint.read(full, MASTER).view(parameter.shape))
            for local, buffer in module.named_buffers():
                buffer.copy_(self._buffers[f"{prefix}.{local}"])
            self._layer, self._weights = prefix, folded_weights(prefix, module)
            module.to_empty(device="meta")
        return self._weights[name].flatten()


def folded_weights(prefix: str, attention: Attention) -> dict[str, Tensor]:
    """The weights of the projections of `attention`, by full names, with what its interaction does multiplied in; those
    it does nothing to as they are. `prefix` is the full name of the module."""
    maps = attention.interaction.linear_maps()
    return {
        f"{prefix}.{name}.weight": getattr(attention, name).folded(getattr(maps, projection))
        for projection, name in attention.folded.items()
    }
