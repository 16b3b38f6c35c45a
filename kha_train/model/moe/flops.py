"""Operation counts of the expert operator in torch's FlopCounterMode. Import it before counting. Nothing else imports
it, because torch's counter loads Triton where that is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from kha_train.model.moe import grouped

Shape = Sequence[int]
OPERATORS = (grouped.grouped_experts, grouped.grouped_experts_backward)
"""The counted operators; importing their file registers them."""


@register_flop_formula(torch.ops.kha_train.grouped_experts)
def experts(x: Shape, gate_up: Shape, down: Shape, weight: Shape, *_: object, **__: object) -> int:
    """Every copy (tokens times experts per token) through three matrices of one size."""
    _experts, width, both = gate_up
    return 3 * weight[0] * weight[1] * width * both


@register_flop_formula(torch.ops.kha_train.grouped_experts_backward)
def experts_backward(
    grad: Shape, x: Shape, gate_up: Shape, down: Shape, weight: Shape, *_: object, **__: object
) -> int:
    """A product for the gradient of the copies and one for that of each matrix."""
    return 2 * experts(x, gate_up, down, weight)
