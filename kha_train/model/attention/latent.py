"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are made from one
small latent, which is all that decoding keeps beside a rotary key.

Training makes keys and values; decoding attends to the latents themselves, with the up-projections absorbed into the
queries and behind the weighted sum. An interaction acts on the parts without rotation and must be linear for that; with
one that is not, decoding makes keys and values of all tokens anew.
"""

# B batch   T tokens (U: attended tokens)   D model width   H heads   K head width   R rotary width   C latent width

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.model.attention.base import Attention, RowContext
from kha_train.model.attention.projection import LatentProjection, OutputProjection, Projection
from kha_train.model.init import Linear, Normal, residual_std
from kha_train.model.norm import RmsNorm
from kha_train.variants.bases import LatentOptions


class LatentAttention(Attention):
    """Queries [K | R] meet keys [K made from the latent | R shared by all heads]."""

    folded: ClassVar[dict[str, str]] = {"q": "query", "k": "key_up", "v": "value_up"}

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__(config, resolved, layer)
        base = config.attention.base
        assert isinstance(base, LatentOptions)
        width, heads, head_dim = config.model.hidden_size, base.query_heads, base.head_dim
        normal, eps = Normal(config.model.init_std), config.model.norm_eps
        self.scale = (head_dim + base.rotary_dim) ** -0.5
        inputs = base.query_latent_width or width
        self.query_down: nn.Module = nn.Identity()
        if base.query_latent_width:
            self.query_down = nn.Sequential(Linear(width, inputs, normal), RmsNorm(inputs, eps))
        self.query = Projection(inputs, heads, head_dim, normal)
        self.rotary_query = Projection(inputs, heads, base.rotary_dim, normal)
        self.latent = Linear(width, base.latent_width, normal)
        self.latent_norm = RmsNorm(base.latent_width, eps)
        self.rotary_key = Projection(width, 1, base.rotary_dim, normal)
        self.key_up = LatentProjection(base.latent_width, self.components("k"), head_dim, normal)
        self.value_up = LatentProjection(base.latent_width, self.components("v"), head_dim, normal)
        self.output = OutputProjection(heads, head_dim, width, Normal(residual_std(config)))

    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """See `Attention.forward`."""
        query_input = self.query_down(x_BTD)
        turned_BTHR = rows.turn(self.rotary_query(query_input))
        latent_BUC, turned_BU1R = self.latent_norm(self.latent(x_BTD)), rows.turn(self.rotary_key(x_BTD))
        latent_BUC, turned_BU1R = rows.with_past(self, latent_BUC, turned_BU1R)
        if rows.cache is not None and self.interaction.linear:
            out_BTHK = self._attend_to_latents(query_input, turned_BTHR, latent_BUC, turned_BU1R, rows)
            latent_out_BTD: Tensor = self.output(self.finished(rows, x_BTD, out_BTHK))
            return latent_out_BTD
        folds = self.interaction.folds()
        q_BTHK, k_BUHK, v_BUHK = self.exchange(
            rows,
            self.query(query_input, folds.q),
            self.key_up(latent_BUC, folds.k),
            self.value_up(latent_BUC, folds.v),
        )
        query = torch.cat((q_BTHK, turned_BTHR), dim=-1)
        key = torch.cat((k_BUHK, turned_BU1R.expand(-1, -1, self.heads.kv_heads, -1)), dim=-1)
        out_BTHK = self.attended(rows, query, key, v_BUHK, self.scale)
        out_BTD: Tensor = self.output(self.finished(rows, x_BTD, out_BTHK))
        return out_BTD

    def _attend_to_latents(
        self, query_input: Tensor, turned_BTHR: Tensor, latent_BUC: Tensor, turned_BU1R: Tensor, rows: RowContext
    ) -> Tensor:
        """The same function with one key/value head [C | R] for all: MLA's decoding."""
        maps = self.interaction.linear_maps()
        q_BTHC = self.key_up.queries_to_latent(self.query(query_input, maps.q), maps.k)
        latent_BU1C = latent_BUC.unsqueeze(2)
        query, key = torch.cat((q_BTHC, turned_BTHR), dim=-1), torch.cat((latent_BU1C, turned_BU1R), dim=-1)
        out_BTHC = self.attend(query, key, latent_BU1C, rows.documents, self.scale)
        return self.value_up.latent_to_heads(out_BTHC, maps.v)
