"""Compresses a trained decoder's cache: key/value heads become fewer virtual heads that compose them (MEA, app. F).

The weight of G heads, flattened to one column a head, is factored by an SVD, and the H' largest singular values are
kept (MEA eq 36-38):

    W [K D, G] = U S V^T      virtual heads U[:, :H']      composition S[:H'] V^T[:H'] [H', G]

No other factors of rank H' are nearer to W (Eckart and Young 1936), and with H' = G nothing is lost. Keys and values
of a layer are factored apart. The result is explicit multi-head attention with a number of components for each layer,
so it trains, decodes and is counted like any other model. An interaction that is linear is multiplied into the weights
first.
"""

# G key/value heads   J virtual heads   K head width   D model width   H = G * K or J * K   N = K * D

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.config.resolve import implementation
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.decode.absorb import absorb, absorbed_config, rebuilt
from kha_train.errors import ConfigError, DivergedError
from kha_train.model.attention.base import Attention
from kha_train.model.attention.projection import HeadMap
from kha_train.model.decoder import Decoder, lay_out_decoder
from kha_train.variants.attention import Projection
from kha_train.variants.explicit import virtual_heads


class Factors(NamedTuple):
    """The weight of the virtual heads, [J * K, D], their composition [J, G], and the share of the weight that is lost:
    the Frobenius norm of the difference by that of the weight.
    """

    virtual: Tensor
    composition: Tensor
    lost: float


class Compressed(NamedTuple):
    """A weight of an attention that becomes virtual heads: its full name, those of its two factors, the layer, how many
    virtual heads there are, and the width of a head.
    """

    weight: str
    composition: str
    projection: Projection
    layer: int
    heads: int
    width: int


def compressed_config(config: RunConfig, heads_by_layer: Sequence[int]) -> RunConfig:
    """The configuration after compression to so many key/value heads in each layer; 0: all of them, uncomposed.

    Raises ConfigError where a base keeps no heads in its cache, where an interaction cannot be multiplied into the
    weights, and for numbers that the layers do not have.
    """
    attention, heads = config.attention, config.attention.heads()
    if heads.latent or heads.summed:
        kept = "one latent for all heads" if heads.latent else "sums over tokens, and no keys and values"
        raise ConfigError(
            f"decoding keeps {kept}, so there are no cached heads to compress",
            field="attention.base.name",
            value=attention.base.name,
            allowed="bases that cache keys and values by heads",
        )
    before, absorbed = attention.interaction, absorbed_config(config)
    if absorbed is None:
        raise ConfigError(
            "acts on activations, so its heads are not a product of weights that an SVD could factor",
            field="attention.interaction.name",
            value=before.name,
            allowed="interactions that are linear between a projection and its norm, as in kha_linear",
        )
    composed: tuple[Projection, ...] = ("k", "v")
    if any(one.components(p, heads) < heads.kv_heads for one in config.interactions for p in composed):
        raise ConfigError(
            "is compressed already",
            field="attention.interaction",
            value=before.name,
            fix="compress the model that it was made of",
        )
    _check_heads(config, heads_by_layer)
    options = virtual_heads(absorbed.attention.interaction, heads, heads_by_layer)
    # No value of a composition leaves heads as they are, so there is nothing to decay towards.
    decay = "zero" if config.optim.interaction_decay == "identity" else config.optim.interaction_decay
    optim = replace(config.optim, interaction_decay=decay)
    compressed = replace(config, attention=replace(attention, interaction=options), optim=optim)
    validate(compressed)
    return compressed


def factored(weight_HD: Tensor, width: int, kept: int) -> Factors:
    """The factors of the weight [G * width, D] of G heads, computed in fp64, in its dtype. Raises DivergedError when it
    is not finite.
    """
    if not torch.isfinite(weight_HD).all():
        fix = "compress an earlier checkpoint of the run"
        raise DivergedError("the weights of keys or values are not finite", field="checkpoint", fix=fix)
    weight_GN = weight_HD.double().unflatten(0, (-1, width)).flatten(1)
    u_NG, s_G, vh_GG = torch.linalg.svd(weight_GN.T, full_matrices=False)
    virtual_HD = u_NG[:, :kept].T.unflatten(1, (width, -1)).flatten(0, 1)
    composition_JG = s_G[:kept, None] * vh_GG[:kept]
    lost = float(s_G[kept:].norm() / s_G.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return Factors(virtual_HD.to(weight_HD.dtype).contiguous(), composition_JG.to(weight_HD.dtype), lost)


def compressed_weights(compressed: Decoder) -> list[Compressed]:
    """What becomes virtual heads in a compressed decoder, which may be on `meta`."""
    heads, found = compressed.config.attention.heads(), []
    attentions = [(prefix, module) for prefix, module in compressed.named_modules() if isinstance(module, Attention)]
    for layer, (prefix, module) in enumerate(attentions):
        maps = module.interaction.linear_maps()
        composed: tuple[tuple[Projection, HeadMap | None], ...] = ("k", maps.k), ("v", maps.v)
        for projection, made in composed:
            if made is not None and made.across_IO is not None:
                weight = f"{prefix}.{module.folded[projection]}.weight"
                composition = f"{prefix}.interaction.compose.{projection}.weight"
                kept, width = made.across_IO.shape[0], heads.width(projection)
                found.append(Compressed(weight, composition, projection, layer, kept, width))
    return found


@torch.no_grad()
def compress(decoder: Decoder, heads_by_layer: Sequence[int]) -> Decoder:
    """A decoder with so many key/value heads in each layer (0: all), which shares all other parameters with `decoder`.
    Raises ConfigError as `compressed_config`, DivergedError as `factored`.
    """
    config = compressed_config(decoder.config, heads_by_layer)
    state = absorb(decoder).state_dict()
    for one in compressed_weights(lay_out_decoder(config)):
        factors = factored(state[one.weight], one.width, one.heads)
        state |= {one.weight: factors.virtual, one.composition: factors.composition}
    return rebuilt(decoder, config, decoder.resolved._replace(interaction=implementation(config)), state)


def _check_heads(config: RunConfig, heads_by_layer: Sequence[int]) -> None:
    layers, most = config.model.layers, config.attention.heads().kv_heads
    if len(heads_by_layer) != layers or not any(heads_by_layer):
        raise ConfigError(
            "no layer is compressed" if len(heads_by_layer) == layers else f"the model has {layers} layers",
            field="--layers",
            value=list(heads_by_layer),
        )
    wrong = [count for count in heads_by_layer if not 0 <= count <= most]
    if wrong:
        raise ConfigError("the layer has other heads", field="--kv-heads", value=wrong[0], allowed=f"1 to {most}")
