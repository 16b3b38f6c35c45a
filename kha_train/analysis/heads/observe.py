"""Looks into the attention of a trained decoder while it computes its forward, and silences heads.

A decoder of its own is watched: the forward of training knows nothing of this. Head outputs are what enters the output
projection, after every norm and gate. Attention weights are computed again, by `Attention.weights`, from what a layer
hands to its backend, some queries at a time: this works for every base, and whatever its backend is.
"""

# B rows   T tokens of a row   H heads   W value head width   K query/key head width   G key/value heads
# U attended tokens   Q query tokens   N tokens without padding, or labels   J = 1 or H
# R places of the flattened B * T that hold a token   S document borders

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kha_train.analysis.heads.sums import FEWEST_ATTENDED, GateSums, MeanSums, OutputSums, WeightSums
from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.batch import Batch
from kha_train.model.attention.backends import Documents
from kha_train.model.attention.base import Attention
from kha_train.model.attention.gate import OutputGate
from kha_train.model.attention.interaction import Gated
from kha_train.model.attention.projection import OutputProjection
from kha_train.model.decoder import Decoder
from kha_train.model.host import inputs_of

ROW_QUERIES = 512
"""At most this many tokens of a row, evenly spread, have their attention weights read."""
CHUNK_WEIGHTS = 2**22
"""At most this many weights of a layer are computed at once, or those of one query."""


@dataclass
class LayerSums:
    """What was seen of one layer. `weights` is None if its attention has none that sum to 1."""

    outputs: OutputSums
    weights: WeightSums | None = None
    gates: dict[str, GateSums] = field(default_factory=dict)


class Observer:
    """Forwards of `decoder` over `batches`; `advance` is called after each forward of a batch."""

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], advance: Callable[[], None]) -> None:
        self._decoder, self._batches, self._advance = decoder, batches, advance
        self._batch = batches[0]
        self.attentions = [module for module in decoder.modules() if isinstance(module, Attention)]

    def mean_outputs(self) -> list[Tensor]:
        """The mean output of each head of each layer, [H, W] each."""
        sums = [MeanSums() for _ in self.attentions]

        def see(one: MeanSums, out_BTHW: Tensor) -> Tensor:
            one.add(self._real(out_BTHW))
            return out_BTHW

        with ExitStack() as hooks:
            for attention, one in zip(self.attentions, sums, strict=True):
                hooks.enter_context(_on_outputs(attention, partial(see, one)))
            self._nats()
        return [one.mean_HW() for one in sums]

    def outputs(self, layer: int) -> Tensor:
        """What the heads of a layer give for every token, [N, H, W]."""
        seen: list[Tensor] = []

        def see(out_BTHW: Tensor) -> Tensor:
            seen.append(self._real(out_BTHW).clone())
            return out_BTHW

        with _on_outputs(self.attentions[layer], see):
            self._nats()
        return torch.cat(seen)

    def patterns(self, layer: int) -> list[Tensor]:
        """The attention weights of a layer for the queries that are read, [H, Q, U] each, some queries of a row at a
        time; empty if its attention has none that sum to 1.
        """
        attention, seen = self.attentions[layer], list[Tensor]()

        def see(q_BTHK: Tensor, k_BUGK: Tensor, documents: Documents, scale: float) -> None:
            seen.extend(
                weights_HQU.float() for weights_HQU, _, _ in self._weights(attention, q_BTHK, k_BUGK, documents, scale)
            )

        with _on_attend(attention, see):
            self._nats()
        return seen

    def sums(self, means: Sequence[Tensor]) -> tuple[list[LayerSums], Tensor]:
        """What there is to see in each layer, given the mean outputs, and the cross-entropy of every label [N]."""
        layers = [LayerSums(OutputSums(mean_HW)) for mean_HW in means]
        with ExitStack() as hooks:
            for attention, layer in zip(self.attentions, layers, strict=True):
                hooks.enter_context(_on_outputs(attention, partial(self._see_outputs, layer)))
                hooks.enter_context(_on_attend(attention, partial(self._see_weights, layer, attention)))
                for name, module in attention.named_modules():
                    if isinstance(module, Gated):
                        layer.gates[name] = GateSums()
                        see = partial(self._see_gate, layer.gates[name], deepcopy(module).double())
                        hooks.enter_context(_before(module, see))
                    elif isinstance(module, OutputGate):
                        layer.gates[name] = GateSums()
                        hooks.enter_context(_after(module, partial(self._see_output_gate, layer.gates[name])))
            return layers, self._nats()

    def documents(self) -> Tensor:
        """The document of every label [N], by number."""
        found, before = [], 0
        for batch in self._batches:
            place_N = (batch.labels_BT.flatten() != IGNORE_LABEL).nonzero().squeeze(1)
            found.append(before + torch.searchsorted(batch.cu_seqlens_S.long(), place_N, right=True) - 1)
            before += len(batch.cu_seqlens_S) - 1
        return torch.cat(found)

    def silenced(self, layer: int, head: int) -> Tensor:
        """The cross-entropy of every label [N] when the output of a head is zero."""

        def silence(out_BTHW: Tensor) -> Tensor:
            heads_H = torch.ones(out_BTHW.shape[2], dtype=out_BTHW.dtype)
            heads_H[head] = 0.0
            # Not a product: a head whose output is not finite is silenced too.
            return out_BTHW.where(heads_H[:, None] > 0, 0.0)

        with _on_outputs(self.attentions[layer], silence):
            return self._nats()

    @torch.no_grad()
    def _nats(self) -> Tensor:
        """The cross-entropy of every unmasked label, float64, in order."""
        found = []
        for batch in self._batches:
            self._batch = batch
            tokens = self._decoder(*inputs_of(batch, torch.device("cpu")), by_token=True).tokens
            found.append(tokens.nats[batch.labels_BT != IGNORE_LABEL].double())
            self._advance()
        return torch.cat(found)

    def _real(self, x_BTHW: Tensor) -> Tensor:
        """The tokens without padding, [N, H, W]."""
        x_NHW, real_R = x_BTHW.flatten(0, 1), self._batch.real_R
        return x_NHW if real_R is None else x_NHW.index_select(0, real_R)

    def _see_outputs(self, layer: LayerSums, out_BTHW: Tensor) -> Tensor:
        layer.outputs.add(self._real(out_BTHW))
        return out_BTHW

    def _see_gate(self, sums: GateSums, wide: Gated, x_BTHK: Tensor) -> Tensor:
        x_1NHK = self._real(x_BTHK).double().unsqueeze(0)
        sums.add(wide.gates(x_1NHK).squeeze(0), wide.derivative(x_1NHK))
        return x_BTHK

    def _see_output_gate(self, sums: GateSums, gates_BTHW: Tensor) -> None:
        sums.add(self._real(gates_BTHW).double())

    def _see_weights(
        self, layer: LayerSums, attention: Attention, q_BTHK: Tensor, k_BUGK: Tensor, documents: Documents, scale: float
    ) -> None:
        for weights_HQU, row, some_Q in self._weights(attention, q_BTHK, k_BUGK, documents, scale):
            layer.weights = layer.weights or WeightSums(q_BTHK.shape[2])
            layer.weights.add(weights_HQU, some_Q, self._batch.positions_BT[row, some_Q])

    def _weights(
        self, attention: Attention, q_BTHK: Tensor, k_BUGK: Tensor, documents: Documents, scale: float
    ) -> Iterator[tuple[Tensor, int, Tensor]]:
        """The weights [H, Q, U] of some queries at a time, in float64, with their row and their places in it."""
        heads = q_BTHK.shape[2]
        for row, place_Q in enumerate(self._queries()):
            longest = int(place_Q[-1]) + 1 if len(place_Q) else 1
            for some_Q in place_Q.split(max(1, CHUNK_WEIGHTS // (heads * longest))):
                end = int(some_Q[-1]) + 1
                q_1QHK, k_1UGK = q_BTHK[row, some_Q].double()[None], k_BUGK[row, :end].double()[None]
                weights_1HQU = attention.weights(q_1QHK, k_1UGK, _part(documents, row, some_Q, end), scale)
                if weights_1HQU is None:
                    return
                yield weights_1HQU[0], row, some_Q

    def _queries(self) -> Iterator[Tensor]:
        """The places of each row whose weights are read: tokens that attend to two tokens or more."""
        positions_BT = self._batch.positions_BT
        asked = positions_BT >= FEWEST_ATTENDED - 1
        if self._batch.real_R is not None:
            real = torch.zeros(positions_BT.numel(), dtype=torch.bool)
            real[self._batch.real_R] = True
            asked &= real.view_as(asked)
        for asked_T in asked:
            place_Q = asked_T.nonzero().squeeze(1)
            count = min(len(place_Q), ROW_QUERIES)
            yield place_Q[torch.arange(count) * len(place_Q) // max(1, count)]


def _part(documents: Documents, row: int, place_Q: Tensor, end: int) -> Documents:
    """What the queries at `place_Q` of a row may attend to, of its first `end` tokens."""
    mask_BJTU = documents.mask_BJTU
    if mask_BJTU is None:
        mask_1JQU = (torch.arange(end) <= place_Q[:, None])[None, None]
    else:
        mask_1JQU = mask_BJTU[min(row, len(mask_BJTU) - 1)][None, :, place_Q, :end]
    return Documents(None, end, mask_1JQU)


@contextmanager
def _before(module: nn.Module, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, the first argument of `module` is what `see` returns for it."""

    def replace(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *rest = arguments
        return see(first), *rest

    handle = module.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block, `see` is given what `module` returns."""
    handle = module.register_forward_hook(lambda module, arguments, returned: see(returned))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_outputs(attention: Attention, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, `see` is given the head outputs [B, T, H, W], and returns what the output projection reads."""
    (projection,) = (module for module in attention.modules() if isinstance(module, OutputProjection))
    with _before(projection, see):
        yield


@contextmanager
def _on_attend(attention: Attention, see: Callable[[Tensor, Tensor, Documents, float], None]) -> Iterator[None]:
    """Inside the block, `see` is given what the attention hands to its backend, without the values."""
    backend = attention.attend

    def attend(q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, documents: Documents, scale: float) -> Tensor:
        see(q_BTHK, k_BUGK, documents, scale)
        return backend(q_BTHK, k_BUGK, v_BUGW, documents, scale)

    attention.attend = attend
    try:
        yield
    finally:
        attention.attend = backend
