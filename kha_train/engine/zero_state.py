"""The fp32 state a rank owns under ZeRO, as live views from which checkpoints are made and into which they are
restored.

Needs no DeepSpeed import: it reads the layout that DeepSpeed left on its optimizer and on the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kha_train.engine.contract import Fragment
from kha_train.optim import ShareOptimizer

Shapes = Mapping[str, tuple[int, ...]]
"""The global shape of every parameter by name."""


def replicated_fragments(
    optimizer: Any, module: nn.Module, shapes: Shapes, flat_masters: list[Tensor], starts: Mapping[str, int]
) -> Iterator[Fragment]:
    """Fragments under ZeRO 1 and 2, where a group is one flat tensor cut into equal shares. `starts` tells where a
    parameter begins of which this rank holds only a part.
    """
    # DeepSpeed attaches its bookkeeping to each of them.
    parameters: Iterator[tuple[str, Any]] = module.named_parameters()
    for name, parameter in parameters:
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        address = mapping.get_hp_fragment_address()
        flat = flat_masters[mapping.param_group_index]
        views = _views(optimizer, flat, address.start, address.numel)
        start = starts.get(name, 0) + mapping.lp_fragment_address.start
        yield Fragment(name, shapes[name], start, views, flat, address.start)


def partitioned_fragments(optimizer: Any, module: nn.Module, shapes: Shapes, rank: int) -> Iterator[Fragment]:
    """Fragments under ZeRO 3, where each parameter is cut into equal shares, the last one padded."""
    for name, parameter in module.named_parameters():
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * share
        length = min(share, math.prod(shapes[name]) - start)
        if length > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            views = _views(optimizer, flat, offset, length)
            yield Fragment(name, shapes[name], start, views, flat, offset)


def owned_gradients(optimizer: Any, module: nn.Module, stage: int) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the gradient under ZeRO `stage`, by parameter name. Valid between the last micro-batch and
    the step.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = optimizer.fp16_groups if stage == 3 else optimizer.params_in_partition
    for number, group in enumerate(groups):
        # There may be padding between the parts and after the last one.
        parts = [part for part in optimizer.averaged_gradients[number] if not getattr(part, "_zero_padding", False)]
        for parameter, part in zip(group, parts, strict=False):
            yield names[id(parameter)], part


def _views(optimizer: Any, flat: Tensor, start: int, length: int) -> dict[str, Tensor]:
    stepper: ShareOptimizer = optimizer.optimizer
    return {kind: tensor.narrow(0, start, length) for kind, tensor in stepper.kept(flat).items()}
