"""Sigmoid gating of head outputs (Qiu et al. 2025, arXiv 2505.06708): y = o * sigmoid(x W) between softmax(QK)V and the
output projection, with a gate of its own for each head.

The gate reads the layer's normalised input, as the queries do. It is not the identity at the start: with small weights
it halves every output.
"""

# B batch   T tokens   D model width   H query heads   W value head width

from __future__ import annotations

from torch import Tensor

from kha_train.config.schema import RunConfig
from kha_train.heads.maths import gates
from kha_train.metric import Metric
from kha_train.model.init import Linear, Normal
from kha_train.model.observed import UNREAD, Report

MEAN = Metric("attn/output_gate", "1", "mean of the sigmoid gate of head outputs", combine="mean", layers="mean")


class OutputGate(Linear):
    """`outputs` numbers for H heads: one for each head, or one for each of its dimensions."""

    metrics = (MEAN,)

    def __init__(self, config: RunConfig, outputs: int) -> None:
        super().__init__(config.model.hidden_size, outputs, Normal(config.model.init_std))
        self.heads = config.attention.base.heads().query_heads

    def forward(self, x_BTD: Tensor, report: Report = UNREAD) -> Tensor:
        """The gates, from 0 to 1, [B, T, H, 1] or [B, T, H, W]; their mean goes to `report`."""
        gates_BTHW = gates(x_BTD, self.weight, self.heads)
        report.mean(MEAN.name, gates_BTHW)
        return gates_BTHW


def build_gate(config: RunConfig) -> OutputGate | None:
    """The gate that `attention.base.output_gate` asks for; None without one."""
    outputs = config.attention.base.gate_outputs()
    return OutputGate(config, outputs) if outputs else None
