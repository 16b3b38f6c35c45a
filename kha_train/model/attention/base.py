"""The contract of an attention base: what a variant file must provide, and what it receives."""

# B batch   T tokens (U: attended tokens)   D model width   H heads   K head width
# G key/value heads   W value head width

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.metric import Metric
from kha_train.model.attention.backends import BACKENDS, Backend, Documents, masked_softmax, scores
from kha_train.model.attention.cache import Cache
from kha_train.model.attention.context import ContextRanks
from kha_train.model.attention.gate import build_gate
from kha_train.model.attention.interaction import QKV, build_interaction
from kha_train.model.norm import TurningNorm
from kha_train.model.observed import UNREAD, Report
from kha_train.model.rope import Rotary, rotate
from kha_train.variants.attention import Projection as ProjectionName
from kha_train.variants.registry import BASES


class RowContext(NamedTuple):
    """What all layers of one forward share: the rotation of every token (None without rotary embedding), the documents
    of every row and, when decoding, the cache of earlier tokens; `rotary_of_all` rotates these and the new ones, where
    a layer keeps keys that are not rotated. `report` takes the values of metrics. With `context` the tokens are a part
    of rows that ranks share, and `documents` are those of whole rows.
    """

    rotary: Rotary | None
    documents: Documents
    cache: Cache | None = None
    report: Report = UNREAD
    rotary_of_all: Rotary | None = None
    context: ContextRanks | None = None

    def turn(self, x_BTHK: Tensor) -> Tensor:
        """Queries or keys, rotated by the token's position; unchanged without rotary embedding."""
        return x_BTHK if self.rotary is None else rotate(x_BTHK, self.rotary)

    def norm_and_turn(self, norm: nn.Module, x_BTHK: Tensor) -> Tensor:
        """Queries or keys, normalised and then rotated as whole heads."""
        if isinstance(norm, TurningNorm):
            assert self.rotary is not None
            turned_BTHK: Tensor = norm(x_BTHK, self.rotary)
            return turned_BTHK
        return self.turn(norm(x_BTHK))

    def attended(self) -> RowContext:
        """The same for keys of all attended tokens, those in the cache included."""
        return self if self.cache is None else self._replace(rotary=self.rotary_of_all)

    def with_past(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """What `layer` attends to, [B, U, ...]: the arguments themselves or, when decoding, the cached tokens followed
        by them.
        """
        return new if self.cache is None else self.cache.extend(layer, *new)

    def past_sums(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """The sums [B, ...] over the cached tokens of `layer`, which then include what the `new` tokens add. Decoding
        only.
        """
        assert self.cache is not None, "sums over earlier tokens are kept while decoding"
        return self.cache.add(layer, *new)


class Attention(nn.Module, ABC):
    """Maps a normalised hidden state to what is added to the residual stream.

    A base builds its projections and norms from `config`, with the kernels of `resolved`; its interaction and backend
    are built here. The order is fixed: projection -> interaction -> QK-norm -> RoPE -> backend -> output gate -> output
    projection. A base passes `interaction.folds()` to its projections and `folds().output` to its output, passes keys
    and values that it has from `with_past` through `interaction.read_keys` and `read_values`, asks `attended` for head
    outputs (it calls the backend, with other ranks where they share rows), and passes these through `finished`.
    Parameters that variants share have the same names in all of them, because the name determines the initial value.
    `folded` names the projection that makes each of q, k, v, for code that multiplies an
    interaction into the weights permanently. `metrics` declares what a base reports.
    """

    folded: ClassVar[dict[str, str]]
    metrics: tuple[Metric, ...] = ()

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int = 0) -> None:
        super().__init__()
        self.heads = config.attention.base.heads()
        self.attend = self.backend(config, resolved)
        self.interaction = build_interaction(config, resolved.interaction, layer)
        self._options = config.attention.interaction.at(layer)
        self.gate = build_gate(config)

    @abstractmethod
    def forward(self, x_BTD: Tensor, rows: RowContext) -> Tensor:
        """[B, T, D] -> [B, T, D] in the same dtype; no token sees a later one, or one of another document. State that
        later tokens need goes through `rows.with_past`; values for metrics go through `rows.report`.
        """

    def components(self, projection: ProjectionName) -> int:
        """How many heads to project, of which the interaction makes those of `heads`."""
        return self._options.components(projection, self.heads)

    def backend(self, config: RunConfig, resolved: Resolved) -> Backend:
        """What computes heads from queries, keys and values, as `resolved` says."""
        return BACKENDS[resolved.backend.name]

    def exchange(self, rows: RowContext, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGW: Tensor) -> QKV:
        """Apply the interaction to queries, keys and values. It is also given `rows.report` if it declares metrics."""
        further = (rows.report,) if self.interaction.metrics else ()
        heads: QKV = self.interaction(q_BTHK, k_BTGK, v_BTGW, *further)
        return heads

    def attended(self, rows: RowContext, q_BTHK: Tensor, k_BUGK: Tensor, v_BUGW: Tensor, scale: float) -> Tensor:
        """What `attend` makes of these heads, with the other ranks that share the rows, if any: [B, T, H, W]."""
        if rows.context is None:
            return self.attend(q_BTHK, k_BUGK, v_BUGW, rows.documents, scale)
        return rows.context.attend(self.attend, q_BTHK, k_BUGK, v_BUGW, rows.documents, scale)

    def finished(self, rows: RowContext, x_BTD: Tensor, out_BTHW: Tensor) -> Tensor:
        """What the output projection reads: the outputs of the backend after the interaction's part and the gate, which
        sees the layer's input.
        """
        out_BTHW = self.interaction.outputs(out_BTHW)
        return out_BTHW if self.gate is None else out_BTHW * self.gate(x_BTD, rows.report)

    def weights(self, q_BTHK: Tensor, k_BUGK: Tensor, documents: Documents, scale: float) -> Tensor | None:
        """The weights of every query head over the tokens it attends to, [B, H, T, U] in at least fp32, from what
        `attend` is given. They sum to 1. None where a base has no such weights. Not used by `forward`, because most
        backends never hold them all: this is for looking at a trained model.
        """
        return masked_softmax(scores(q_BTHK, k_BUGK) * scale, documents)


def build_attention(config: RunConfig, resolved: Resolved, layer: int = 0) -> Attention:
    """The base registered under `config.attention.base.name`, computed as `resolved` says; layers count from 0."""
    attention: Attention = BASES[config.attention.base.name].load()(config, resolved, layer)
    return attention
