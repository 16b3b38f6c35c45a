"""The model classes of transformers that we know, and which of them a configuration of ours is."""

from __future__ import annotations

from kha_train.config.schema import RunConfig
from kha_train.export.family import Family
from kha_train.export.hosts import deepseek_v3, glm4_moe, llama, olmoe, qwen3

_KNOWN = (qwen3.DENSE, llama.FAMILY, qwen3.EXPERTS, olmoe.FAMILY, glm4_moe.FAMILY, deepseek_v3.FAMILY)
FAMILIES = {family.model_type: family for family in _KNOWN}
"""By `model_type`, in the order in which an export tries them."""


def family_of(config: RunConfig) -> Family:
    """The first family that computes the decoder of `config`, interactions and output gate left out.

    Raises ConfigError that names the setting for which there is none.
    """
    for family in FAMILIES.values():
        if family.refuses(config) is None:
            return family
    problem = FAMILIES[_nearest(config)].refuses(config)
    assert problem is not None, "every family was tried"
    raise problem


def _nearest(config: RunConfig) -> str:
    """The family whose refusal says most."""
    if config.attention.heads().latent:
        return "deepseek_v3"
    plain = config.moe.dense_layers < config.model.layers and config.moe.score == "softmax"
    return "qwen3_moe" if plain else "glm4_moe"
