"""The contract of an attention base: what a variant file has to provide, and what it is given."""

# B batch   T tokens   D model width

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from kha_train.config.registry import BASES
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import Documents
from kha_train.model.rope import Rotary


class RowContext(NamedTuple):
    """What all layers of one forward share: the rotation of every token and the documents of every row."""

    rotary: Rotary
    documents: Documents


class Attention(nn.Module, ABC):
    """Turns a normalised hidden state into what is added to the residual stream.

    A base builds its projections, its norms and (by `build_interaction`) its interaction from `config`. Its order is
    fixed: projection -> interaction -> QK-norm -> RoPE -> backend -> output projection. Parameters that variants have
    in common carry the same names in all of them, for the name decides the initial value.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """[B, T, D] -> [B, T, D] in the same dtype; no token sees a later one, or one of another document."""


def build_attention(config: RunConfig) -> Attention:
    """The base registered under `config.attention.base.name`."""
    return BASES[config.attention.base.name].load()(config)
