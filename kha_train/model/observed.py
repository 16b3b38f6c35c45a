"""Values that modules report in a forward, for the metrics they declare.

A block makes a `Report` for each of its calls, hands it to its modules, and returns the values in its `BlockStats`. So
nothing is counted twice: activation checkpointing runs a forward again and drops everything the second one returns. A
caller that passes no `Report` gets only the module's output.
"""

# B batch   T places of a row   R places of the flattened B * T that hold a token

from __future__ import annotations

import torch
from torch import Tensor, nn

from kha_train.metric import Metric

Values = dict[str, Tensor]
"""Values by metric name, without gradient: a scalar, or the result of `averaged` for a metric that combines by `mean`
or `rms`. A module reports the same names in every micro-batch, on every rank.
"""


class Report:
    """Takes the values of one call of a block into `values`, each name once. Without `values` the reports are dropped.

    `real_R` (int64) are the places of the rows that hold a token (None: all). `observed` is set in steps that compute
    the metrics that are too costly for every step.
    """

    def __init__(self, values: Values | None = None, real_R: Tensor | None = None, observed: bool = False) -> None:
        self._values, self._real_R, self.observed = values, real_R, observed

    def of_tokens(self) -> Report:
        """The same report for modules that receive only the tokens, [N, ...], without padding."""
        return Report(self._values, None, self.observed)

    def __call__(self, name: str, value: Tensor) -> None:
        if self._values is not None:
            assert name not in self._values, f"{name} is reported twice in one layer"
            self._values[name] = value.detach()

    def mean(self, name: str, x_BT: Tensor) -> None:
        """Report the mean of `x_BT` [B, T, ...] over its tokens, for a metric that combines by `mean`."""
        if self._values is not None:
            self(name, averaged(x_BT, self._real_R))

    def rms(self, name: str, x_BT: Tensor) -> None:
        """Report the root mean square of `x_BT` [B, T, ...] over its tokens, for a metric that combines by `rms`."""
        if self._values is not None:
            self(name, squares_averaged(x_BT, self._real_R))


UNREAD = Report()
"""The `Report` of a call that drops its values."""


@torch.no_grad()
def averaged(x: Tensor, real_R: Tensor | None = None) -> Tensor:
    """The sum of all elements of `x` and their number, fp64 [2]. With `real_R` the first two dimensions of `x` are
    [B, T], and only the places that hold a token count."""
    if real_R is not None:
        x = x.flatten(0, 1).index_select(0, real_R)
    total = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).double()
    return torch.stack([total, total.new_full((), x.numel())])


@torch.no_grad()
def squares_averaged(x: Tensor, real_R: Tensor | None = None) -> Tensor:
    """As `averaged`, for the squares of `x`. Used by metrics that combine by `rms`."""
    if real_R is not None:
        x = x.flatten(0, 1).index_select(0, real_R)
    norm = torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.stack([norm.double().square(), norm.new_full((), x.numel(), dtype=torch.float64)])


def declared_metrics(module: nn.Module) -> list[Metric]:
    """The metrics declared by `module` and the modules inside it, in their attribute `metrics`."""
    return [metric for part in module.modules() for metric in getattr(part, "metrics", ())]
