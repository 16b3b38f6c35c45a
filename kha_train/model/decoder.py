"""The whole model: tokens -> embedding -> blocks -> norm -> head -> logits, or the summed loss."""

# B batch   T tokens   D model width   V vocabulary   L layers   E experts   S document borders   H query heads
# N = B * T, flattened   R places of the flattened B * T that hold a token

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kha_train.config.resolve import Resolved, decide, resolve_decoding, turned_dimensions
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import alibi_slopes, lay_out_cached, lay_out_documents
from kha_train.model.attention.base import RowContext
from kha_train.model.attention.cache import Cache
from kha_train.model.attention.context import ContextRanks
from kha_train.model.attention.interaction import Interaction
from kha_train.model.block import Block, BlockStats
from kha_train.model.device import device_facts, resolve_on
from kha_train.model.host import to_device
from kha_train.model.init import DeclaredModule, Normal, initialise
from kha_train.model.loss import TokenScores, chunked_cross_entropy, chunked_token_scores
from kha_train.model.moe.balance import BIAS_UPDATES, relative_load
from kha_train.model.moe.layer import MoeLayer
from kha_train.model.moe.router import Router
from kha_train.model.norm import RmsNorm
from kha_train.model.observed import Report, Values, declared_metrics
from kha_train.model.recompute import runner
from kha_train.model.rope import RotaryTable, Scaling
from kha_train.variants.attention import POSITIONS
from kha_train.variants.backends import TRAITS


class AuxiliaryLosses(NamedTuple):
    """The router's own losses, summed over tokens and layers, scalars. `total_sum` is their weighted sum, the only one
    with a gradient; `balance_sum` and `z_sum` are for the record, 0 when not needed.
    """

    total_sum: Tensor
    balance_sum: Tensor
    z_sum: Tensor


class DecoderOutput(NamedTuple):
    """The result of a forward. `logits_BTV` (at least fp32) without labels; with labels `loss_sum` (scalar, at least
    fp32) or, for scores by token, `tokens` ([B, T] each). The others are None. `load_LE` (int64, no gradient) is the
    tokens routed to each expert of each of the L layers that have experts. `auxiliary` is None outside training, and
    without auxiliary losses. `values` are what modules reported for their metrics, by name; their first dimension is
    the layers that reported.
    """

    logits_BTV: Tensor | None
    loss_sum: Tensor | None
    load_LE: Tensor
    auxiliary: AuxiliaryLosses | None
    values: Values
    tokens: TokenScores | None = None


class Embedding(DeclaredModule):
    """One vector of width D for each of V tokens and, with learned positions, one for each position."""

    weight: nn.Parameter
    positions: nn.Parameter

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        shape = (config.model.vocab_size, config.model.hidden_size)
        self.declare_parameter("weight", shape, Normal(config.model.init_std))
        self.learns_positions = POSITIONS[config.attention.positions].embedding
        if self.learns_positions:
            places = (config.model.seq_len, config.model.hidden_size)
            self.declare_parameter("positions", places, Normal(config.model.init_std))

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """[B, T] int64, twice -> [B, T, D] in the dtype of the weight."""
        x_BTD = functional.embedding(tokens_BT, self.weight)
        return x_BTD + functional.embedding(positions_BT, self.positions) if self.learns_positions else x_BTD


class Head(DeclaredModule):
    """The output layer. It registers its `weight` [V, D] even when it is the embedding's: a sharded engine gathers a
    parameter around the forward of each module that registers it, and both modules use it.
    """

    weight: nn.Parameter

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.chunk_tokens = config.model.loss_chunk_tokens
        shape = (config.model.vocab_size, config.model.hidden_size)
        self.declare_parameter("weight", shape, Normal(config.model.init_std))

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None, by_token: bool = False) -> Tensor | TokenScores:
        """Logits [B, T, V] in at least fp32; with labels the summed cross-entropy instead, a scalar, or the scores of
        every label, [B, T] each, where they are asked for `by_token`."""
        if labels_BT is None:
            logits_BTV = functional.linear(x_BTD, self.weight)
            return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        flat = x_BTD.flatten(0, 1), self.weight, labels_BT.flatten(), self.chunk_tokens
        if by_token:
            return TokenScores(*(scores_N.view(labels_BT.shape) for scores_N in chunked_token_scores(*flat)))
        return chunked_cross_entropy(*flat)


class Decoder(nn.Module):
    """A stack of blocks between an embedding and a head, computed as `resolved` says. Build it with `build_decoder`."""

    def __init__(self, config: RunConfig, resolved: Resolved) -> None:
        super().__init__()
        self.config, self.resolved = config, resolved
        model, base = config.model, config.attention.base
        self._masked = not TRAITS[resolved.backend.name].packed
        self._slopes = alibi_slopes(base.query_heads) if POSITIONS[config.attention.positions].bias else None
        self.embedding = Embedding(config)
        self.rotary = build_rotary_table(config)
        self.blocks = nn.ModuleList(Block(config, resolved, layer) for layer in range(model.layers))
        self.norm = RmsNorm(model.hidden_size, model.norm_eps)
        self.head = Head(config)
        self._run = runner(config)
        self._turns_when_read = any(
            isinstance(module, Interaction) and module.keeps_projected_keys for module in self.modules()
        )
        self.tie_weights()
        self.declared = {metric.name: metric for metric in declared_metrics(self)}
        """The modules' declarations, before `metric.in_force` separates per-layer lists from their summaries."""
        self.observed = False
        """Whether forwards compute the metrics that are too costly to compute in every step. The training step
        sets it.
        """

    def tie_weights(self) -> None:
        """With `model.tie_embeddings`, let the head use the embedding's parameter. Call it again after replacing
        parameters of a built decoder.
        """
        if self.config.model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cu_seqlens_S: Tensor | None = None,
        max_seqlen: int | None = None,
        samples_B: Tensor | None = None,
        real_R: Tensor | None = None,
        cache: Cache | None = None,
        by_token: bool = False,
        context: ContextRanks | None = None,
    ) -> DecoderOutput:
        """Logits, or with `labels_BT` (int64, -100 where masked) the sum of cross-entropies over unmasked labels, or
        the scores of each, without gradient, where they are asked for `by_token`.

        `positions_BT` (int64) defaults to the position in the row, which is at most `model.seq_len` long.
        `cu_seqlens_S` (int32, over the flattened tokens, with every row start) isolates documents; without it a row is
        one document. `samples_B` (int64) are the sample numbers of the rows, 0 .. B-1 by default: only the router's
        warm-up (`moe.routing_warmup_steps`) reads them. `real_R` (int64, ascending) are the places of the flattened B*T
        that hold a token (None: all). The rest is padding: it is not routed, counts in no load and no auxiliary loss,
        and its labels are masked. With `context` the tokens are this rank's part of the rows, `cu_seqlens_S` and
        `max_seqlen` those of whole rows, and all results are of this part. With a `cache` the tokens follow the cached
        ones, each row is one document, and the cache is extended.
        """
        batch, tokens = tokens_BT.shape
        seen = 0 if cache is None else cache.seen
        if positions_BT is None:
            first = context.rank * tokens if context else seen
            positions_BT = torch.arange(first, first + tokens, device=tokens_BT.device).expand(batch, tokens)
        rows = self._rows(batch, tokens, positions_BT, cu_seqlens_S, max_seqlen, cache, context)
        rows = rows._replace(report=Report(observed=self.observed))
        if samples_B is None:
            samples_B = torch.arange(batch, device=tokens_BT.device)
        x_BTD = self.embedding(tokens_BT, positions_BT)
        stats: list[BlockStats] = []
        for block in self.blocks:
            x_BTD, reported = self._run(block, x_BTD, rows, samples_B, real_R)
            stats.append(reported)
        if cache is not None:
            cache.seen += tokens
        x_BTD = self.norm(x_BTD)
        loads = [reported.load_E for reported in stats if reported.load_E is not None]
        load_LE = torch.stack(loads) if loads else torch.zeros(0, 0, dtype=torch.int64, device=x_BTD.device)
        told = load_LE, self._auxiliary(stats), self._values(stats)
        if labels_BT is None:
            return DecoderOutput(self.head(x_BTD), None, *told)
        if by_token:
            return DecoderOutput(None, None, *told, self.head(x_BTD, labels_BT, by_token=True))
        return DecoderOutput(None, self.head(x_BTD, labels_BT), *told)

    def _rows(
        self,
        batch: int,
        tokens: int,
        positions_BT: Tensor,
        cu_seqlens_S: Tensor | None,
        max_seqlen: int | None,
        cache: Cache | None,
        context: ContextRanks | None = None,
    ) -> RowContext:
        # Read here, a sharded embedding stays gathered until the head that shares it: one gather of a micro-batch less.
        device = (self.embedding.weight if self.config.model.tie_embeddings else positions_BT).device
        slopes_H = None
        if self._slopes is not None:
            slopes = context.own_heads(self._slopes) if context else self._slopes
            slopes_H = to_device(torch.tensor(slopes), device)
        rotary = None if self.rotary is None else self.rotary(positions_BT)
        if cache is not None:
            rows = RowContext(rotary, lay_out_cached(tokens, cache.seen, device, slopes_H), cache)
            if self.rotary is None or not self._turns_when_read:
                return rows
            return rows._replace(rotary_of_all=self.rotary(cache.positions(positions_BT)))
        length = tokens * (context.size if context else 1)
        documents = lay_out_documents(batch, length, device, cu_seqlens_S, max_seqlen, slopes_H, self._masked)
        return RowContext(rotary, documents, context=context)

    def _values(self, stats: list[BlockStats]) -> Values:
        names = dict.fromkeys(name for reported in stats for name in reported.values)
        for name in names:
            known = self.declared.get(name)
            assert known is not None and known.layers, f"{name} is reported by a layer, but not declared with `layers`"
        return {
            name: torch.stack([reported.values[name].detach() for reported in stats if name in reported.values])
            for name in names
        }

    def _auxiliary(self, stats: list[BlockStats]) -> AuxiliaryLosses | None:
        moe = self.config.moe
        balance = [reported.balance_sum for reported in stats if reported.balance_sum is not None]
        z = [reported.z_sum for reported in stats if reported.z_sum is not None]
        if not balance and not z:
            return None
        zero = torch.zeros((), device=(balance or z)[0].device)
        balance_sum, z_sum = sum(balance, zero), sum(z, zero)
        total_sum = moe.auxiliary_loss.weight * balance_sum + moe.z_loss_weight * z_sum
        return AuxiliaryLosses(total_sum, balance_sum.detach(), z_sum.detach())

    def routers(self) -> list[Router]:
        """The routers of the layers with experts, in order."""
        layers = (block.get_submodule("feed_forward") for block in self.blocks)
        return [layer.router for layer in layers if isinstance(layer, MoeLayer)]

    def selection_bias_LE(self) -> Tensor:
        """A copy of the routers' selection biases, fp32 [L, E]."""
        biases = [router.selection_bias for router in self.routers()]
        return torch.stack(biases) if biases else torch.zeros(0, 0, device=self.norm.weight.device)

    @torch.no_grad()
    def finish_step(self, load_LE: Tensor) -> None:
        """Update the selection biases according to `moe.bias_update`, and tell the routers that a step was applied.

        `load_LE` is the load of the whole global batch: all micro-batches, summed over ranks. Call it after the
        optimiser step of that batch, and not after a discarded step.
        """
        moe, share_LE = self.config.moe, relative_load(load_LE)
        for router, load_E, share_E in zip(self.routers(), load_LE, share_LE, strict=True):
            moved_E = BIAS_UPDATES[moe.bias_update](router.selection_bias, load_E, moe.bias_update_rate)
            router.selection_bias.copy_(moved_E)
            router.finish_step(share_E)


def build_rotary_table(config: RunConfig) -> RotaryTable | None:
    """The rotation of the positions of a row; None without rotary embedding."""
    turned = turned_dimensions(config)
    model = config.model
    return RotaryTable(model.seq_len, turned, model.rope_theta, Scaling.of(model)) if turned else None


def lay_out_decoder(config: RunConfig) -> Decoder:
    """The decoder of `config` on `meta`, for the names and shapes of what it holds: nothing is allocated, and no device
    is asked about.
    """
    with torch.device("meta"):
        return build_decoder(config, resolve_decoding(config))


def build_decoder(config: RunConfig, resolved: Resolved | None = None) -> Decoder:
    """The decoder of `config` on torch's current device. On `meta` nothing is allocated; elsewhere it is initialised
    from `run.seed` in fp32 (see `init.py`).

    `resolved` says what computes it, and is not asked again: a decoder that is moved or cast later computes as before.
    The default is decided for fp32 on torch's current device, and on `meta` for a CPU. For another device or precision,
    give it `resolve_on(config, device)`. Raises ConfigError when the expert backend does not support a size, and, but
    on `meta`, as `resolve`.
    """
    decoder = Decoder(config, resolved or _resolved_by_default(config, torch.get_default_device()))
    if decoder.embedding.weight.device.type != "meta":
        initialise(decoder, config.run.seed)
    return decoder


def _resolved_by_default(config: RunConfig, device: torch.device) -> Resolved:
    config = replace(config, engine=replace(config.engine, precision="fp32"))
    # Where nothing is computed nothing is refused: whoever wants names and shapes need not have the device.
    return decide(config, device_facts(device)) if device.type == "meta" else resolve_on(config, device)
