"""Values that modules return beside their output, for the metrics they declare.

A forward returns `Observed(output, values)` in place of its output; a block returns the values of its modules in its
`BlockStats`. Nothing is counted on the side: activation checkpointing runs a forward twice and drops what the second
one returns.
"""

# B batch   T places of a row   R places of the flattened B * T that hold a token

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kha_train.metric import Metric

Output = TypeVar("Output")
Values = dict[str, Tensor]
"""By the name of the metric, without gradient: a scalar, or what `averaged` makes for one that combines by `mean` or
`rms`. A module reports the same names in every micro-batch, on every rank."""


class Observed(NamedTuple, Generic[Output]):
    """The output of a module, and the values it reports."""

    output: Output
    values: Values


def observed(output: Output, values: Values) -> Output | Observed[Output]:
    """What a module returns that may have values to report: `output` alone when there is none."""
    return Observed(output, values) if values else output


def split(returned: Output | Observed[Output]) -> tuple[Output, Values]:
    """The output of a module, and the values it reported, if any."""
    return (returned.output, returned.values) if isinstance(returned, Observed) else (returned, {})


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
    """As `averaged`, of the squares of `x`: for a metric that combines by `rms`."""
    if real_R is not None:
        x = x.flatten(0, 1).index_select(0, real_R)
    norm = torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.stack([norm.double().square(), norm.new_full((), x.numel(), dtype=torch.float64)])


def declared_metrics(module: nn.Module) -> list[Metric]:
    """What `module` and the modules inside it declare, each with its attribute `metrics`."""
    return [metric for part in module.modules() for metric in getattr(part, "metrics", ())]
