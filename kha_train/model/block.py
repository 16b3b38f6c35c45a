"""One layer of the decoder: attention, then a feed-forward, each normalised and added to the residual stream."""

# B batch   T places of a row   D model width   E experts   R places that hold a token

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.metric import Metric
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.feed_forward import SwiGlu
from kha_train.model.moe.layer import MoeLayer
from kha_train.model.norm import RmsNorm
from kha_train.model.observed import Report, Values

ACTIVATION_RMS = Metric(
    "layer/activation_rms",
    "1",
    "root mean square of the residual stream after a layer, over tokens and width",
    combine="rms",
    layers="max",
)


class BlockStats(NamedTuple):
    """What a block reports about its forward. It is returned, not counted as a side effect, because recomputation runs
    a forward twice. `values` are those of its modules' metrics. For a block with experts, `load_E` (int64, no gradient)
    is the number of tokens that each expert received. The sums over tokens of the auxiliary losses carry their
    gradient, and are None when not needed (see `Routing`).
    """

    values: Values
    load_E: Tensor | None = None
    balance_sum: Tensor | None = None
    z_sum: Tensor | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): experts, or a dense feed-forward in the first
    `moe.dense_layers`.
    """

    def __init__(self, config: RunConfig, resolved: Resolved, layer: int) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.model.hidden_size, config.model.norm_eps)
        self.attention = build_attention(config, resolved, layer)
        self.feed_forward_norm = RmsNorm(config.model.hidden_size, config.model.norm_eps)
        self.has_experts = layer >= config.moe.dense_layers
        self.feed_forward = (
            MoeLayer(config, resolved, layer) if self.has_experts else SwiGlu(config, config.moe.dense_width)
        )
        self.metrics = (ACTIVATION_RMS,) if config.telemetry.layer_statistics_every else ()

    def forward(
        self, x_BTD: Tensor, rows: RowContext, samples_B: Tensor, real_R: Tensor | None = None
    ) -> tuple[Tensor, BlockStats]:
        """The residual stream after this layer, and its statistics. `samples_B` (int64) are the sample numbers of the
        rows, `real_R` (int64) the places of the flattened B*T that hold a token (None: all)."""
        values: Values = {}
        report = Report(values, real_R, rows.report.observed)
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rows._replace(report=report))
        normed_BTD = self.feed_forward_norm(x_BTD)
        if not self.has_experts:
            x_BTD = x_BTD + self.feed_forward(normed_BTD, report)
            self._observe(x_BTD, report)
            return x_BTD, BlockStats(values)
        y_BTD, routing = self.feed_forward(normed_BTD, samples_B, real_R, report, rows.context)
        x_BTD = x_BTD + y_BTD
        self._observe(x_BTD, report)
        return x_BTD, BlockStats(values, routing.load_E, routing.balance_sum, routing.z_sum)

    def _observe(self, x_BTD: Tensor, report: Report) -> None:
        if report.observed and self.metrics:
            report.rms(ACTIVATION_RMS.name, x_BTD)
