"""The activation between the two products of an expert, with the routing weight on it."""

# M routed copies   F expert width   X = 2F, gate and up side by side

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def weighted_swiglu(gate_up_MX: Tensor, weight_M: Tensor) -> Tensor:
    """silu(gate) * up * routing weight, [M, 2F] -> [M, F] in the dtype of `gate_up_MX`.

    Applying the weight here is exact and cheapest: w (a W2) = (w a) W2, on a smaller tensor, and the backward needs no
    expert outputs.
    """
    gate_MF, up_MF = gate_up_MX.chunk(2, dim=-1)
    return (functional.silu(gate_MF) * up_MF * weight_M.unsqueeze(-1)).to(gate_up_MX.dtype)
