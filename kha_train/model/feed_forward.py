"""The feed-forward of a dense layer, and of shared experts."""

# ... leading dimensions   D model width   F inner width   X = 2F, gate and up side by side

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from kha_train.config.schema import RunConfig
from kha_train.model.init import Linear, Normal, residual_std
from kha_train.model.observed import UNREAD, Report


class SwiGlu(nn.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down, of inner width `width`."""

    def __init__(self, config: RunConfig, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(config.model.hidden_size, 2 * width, Normal(config.model.init_std), (width, width))
        self.down = Linear(width, config.model.hidden_size, Normal(residual_std(config)))

    def forward(self, x: Tensor, report: Report = UNREAD) -> Tensor:
        """[..., D] -> [..., D] in the dtype of `x`. `report` takes the values of metrics."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(functional.silu(gate) * up)
        return y
