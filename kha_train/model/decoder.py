"""The whole model: tokens -> embedding -> blocks -> norm -> head -> logits, or the summed loss."""

# B batch   T tokens   D model width   V vocabulary   L layers   E experts   S document borders   H query heads

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import alibi_slopes, lay_out_cached, lay_out_documents
from kha_train.model.attention.base import RowContext
from kha_train.model.attention.cache import Cache
from kha_train.model.block import Block, BlockStats
from kha_train.model.init import DeclaredModule, Normal, initialise
from kha_train.model.loss import chunked_cross_entropy
from kha_train.model.moe.balance import rms_update
from kha_train.model.norm import RmsNorm
from kha_train.model.rope import RotaryTable


class DecoderOutput(NamedTuple):
    """What a forward returns. `logits_BTV` (at least fp32) without labels, `loss_sum` (scalar, at least fp32) with
    them; the other is None. `load_LE` (int64, no gradient) is the tokens routed to each expert of each layer."""

    logits_BTV: Tensor | None
    loss_sum: Tensor | None
    load_LE: Tensor


class Embedding(DeclaredModule):
    """One vector of width D for each of V tokens, and, with learned positions, one for each place."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        shape = (config.model.vocab_size, config.model.hidden_size)
        self.declare_parameter("weight", shape, Normal(config.model.init_std))
        self.learns_positions = config.attention.positions == "learned"
        if self.learns_positions:
            places = (config.model.seq_len, config.model.hidden_size)
            self.declare_parameter("positions", places, Normal(config.model.init_std))

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """[B, T] int64, twice -> [B, T, D] in the dtype of the weight."""
        x_BTD = functional.embedding(tokens_BT, self.weight)
        return x_BTD + functional.embedding(positions_BT, self.positions) if self.learns_positions else x_BTD


class Head(DeclaredModule):
    """The output layer. Registers its `weight` [V, D] even when it is the embedding's: a sharded engine gathers a
    parameter around the forward of each module that registers it, and both use it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.chunk_tokens = config.model.loss_chunk_tokens
        shape = (config.model.vocab_size, config.model.hidden_size)
        self.declare_parameter("weight", shape, Normal(config.model.init_std))

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] in at least fp32; with labels the summed cross-entropy instead, a scalar."""
        if labels_BT is None:
            logits_BTV = functional.linear(x_BTD, self.weight)
            return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return chunked_cross_entropy(x_BTD.flatten(0, 1), self.weight, labels_BT.flatten(), self.chunk_tokens)


class Decoder(nn.Module):
    """A stack of blocks between an embedding and a head. Build it with `build_decoder`."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.embedding = Embedding(config)
        self.rotary = build_rotary_table(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(model.layers))
        self.norm = RmsNorm(model.hidden_size, model.norm_eps)
        self.head = Head(config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """With `model.tie_embeddings`, let the head use the embedding's parameter. To be called again by whoever
        replaces parameters of a built decoder."""
        if self.config.model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cu_seqlens_S: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
    ) -> DecoderOutput:
        """Logits, or with `labels_BT` (int64, -100 where masked) the sum of cross-entropies over unmasked labels.

        `positions_BT` (int64) defaults to the place in the row, which is at most `model.seq_len` long. `cu_seqlens_S`
        (int32, over the flattened tokens, with every row start) isolates documents; without it a row is one document.
        With a `cache` the tokens follow those it has seen, rows are one document each, and the cache goes on.
        """
        batch, tokens = tokens_BT.shape
        seen = 0 if cache is None else cache.seen
        if positions_BT is None:
            positions_BT = torch.arange(seen, seen + tokens, device=tokens_BT.device).expand(batch, tokens)
        rows = self._rows(batch, tokens, positions_BT, cu_seqlens_S, max_seqlen, cache)
        x_BTD = self.embedding(tokens_BT, positions_BT)
        loads: list[Tensor] = []
        for block in self.blocks:
            x_BTD, stats = self._run(block, x_BTD, rows)
            loads.append(stats.load_E)
        if cache is not None:
            cache.seen += tokens
        x_BTD = self.norm(x_BTD)
        if labels_BT is None:
            return DecoderOutput(self.head(x_BTD), None, torch.stack(loads))
        return DecoderOutput(None, self.head(x_BTD, labels_BT), torch.stack(loads))

    def _rows(
        self,
        batch: int,
        tokens: int,
        positions_BT: Tensor,
        cu_seqlens_S: Tensor | None,
        max_seqlen: int | None,
        cache: Cache | None,
    ) -> RowContext:
        device, slopes_H = positions_BT.device, None
        if self.config.attention.positions == "alibi":
            slopes_H = torch.tensor(alibi_slopes(self.config.attention.base.query_heads), device=device)
        rotary = None if self.rotary is None else self.rotary(positions_BT)
        if cache is None:
            return RowContext(rotary, lay_out_documents(batch, tokens, device, cu_seqlens_S, max_seqlen, slopes_H))
        return RowContext(rotary, lay_out_cached(tokens, cache.seen, device, slopes_H), cache)

    def _run(self, block: nn.Module, x_BTD: Tensor, rows: RowContext) -> tuple[Tensor, BlockStats]:
        if self.config.engine.activation_checkpointing == "full" and torch.is_grad_enabled():
            # No random numbers are drawn in a forward, so there is no generator state to keep.
            return checkpoint(block, x_BTD, rows, use_reentrant=False, preserve_rng_state=False)
        return block(x_BTD, rows)

    def selection_bias_LE(self) -> Tensor:
        """A copy of the routers' selection biases, fp32 [L, E]."""
        return torch.stack([block.moe.router.selection_bias for block in self.blocks])

    @torch.no_grad()
    def update_selection_bias(self, load_LE: Tensor) -> None:
        """Move the selection biases by the RMS rule. `load_LE` is the load of the whole global batch: all
        micro-batches, summed over ranks. Call it after the optimiser step of that batch, and not when the step was
        discarded."""
        moved_LE = rms_update(self.selection_bias_LE(), load_LE, self.config.moe.bias_update_rate)
        for block, moved_E in zip(self.blocks, moved_LE, strict=True):
            block.moe.router.selection_bias.copy_(moved_E)


def build_rotary_table(config: RunConfig) -> RotaryTable | None:
    """The rotation of the positions of a row; None without rotary embedding."""
    if config.attention.positions != "rope":
        return None
    return RotaryTable(config.model.seq_len, config.attention.base.rotary_width(), config.model.rope_theta)


def build_decoder(config: RunConfig) -> Decoder:
    """The decoder of `config` on torch's current device. On `meta` nothing is allocated; elsewhere it is initialised
    from `run.seed` (see `init.py`).

    Raises ConfigError when a size does not suit the expert backend.
    """
    decoder = Decoder(config)
    if decoder.embedding.weight.device.type != "meta":
        initialise(decoder, config.run.seed)
    return decoder
