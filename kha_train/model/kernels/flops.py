"""Operation counts of the operators in torch's FlopCounterMode. Import it before counting. Nothing else imports it,
because torch's counter loads Triton where that is installed.
"""

# K head width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from kha_train.model.kernels import knocking_mlp

Shape = Sequence[int]
OPERATORS = (knocking_mlp.knocking_mlp, knocking_mlp.knocking_mlp_backward)
"""The counted operators; importing their files registers them."""


@register_flop_formula(torch.ops.kha_train.knocking_mlp)
def perceptron(x: Shape, up: Shape, gate: Shape, down: Shape | None, **_: object) -> int:
    """A K x K product of every row with up, gate and, if given, down."""
    return _square_products(x) * (2 if down is None else 3)


@register_flop_formula(torch.ops.kha_train.knocking_mlp_backward)
def perceptron_backward(x: Shape, up: Shape, gate: Shape, down: Shape | None, grad: Shape, **_: object) -> int:
    """Up and gate again, and two products for the gradients of each matrix and what it reads."""
    return _square_products(x) * (6 if down is None else 8)


def _square_products(x: Shape) -> int:
    *rows, width = x
    return 2 * torch.Size(rows).numel() * width**2
