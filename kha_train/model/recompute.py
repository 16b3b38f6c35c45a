"""Activation checkpointing (`engine.activation_checkpointing`): what is saved for the backward, and what is recomputed.

`full` saves the input of a block and runs its forward twice. `selective` saves what is expensive to compute for its
size and recomputes the rest: norms, rotations, gates, the router's choice, the small matrices of heads. It saves
products in which every number took at least as many multiplications as the model is wide, and the results of attention
and experts, which take thousands; all else takes one to a few. Measured: `pytest -s tests/model/test_recompute.py`.

Where ranks share the experts (`engine.expert_parallel`), `selective` computes these again as well: it would save the
results of J choices of every token before they are summed, more than everything else in the block.
"""

# B batch   T tokens   D model width   J experts per token

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kha_train.config.schema import RunConfig

EXPERTS = "kha_train::grouped_experts"
ALWAYS_KEPT = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_flash_attention_forward",
        "aten::_grouped_mm",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "torch_attn::_varlen_attn",
        EXPERTS,
    }
)
"""Operators whose results `selective` always saves."""


def runner(config: RunConfig) -> Callable[..., Any]:
    """`run(block, x_BTD, *rest)`: runs the block according to `engine.activation_checkpointing` when a backward
    follows.
    """
    how = config.engine.activation_checkpointing
    if how == "none":
        return _plainly
    # A forward uses no random generator, so there is no generator state to save.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "selective":
        always = ALWAYS_KEPT - {EXPERTS} if config.engine.expert_parallel > 1 else ALWAYS_KEPT
        keep = partial(kept, config.model.hidden_size, always=always)
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, partial(_policy, keep)))

    def run(block: nn.Module, x_BTD: Tensor, *rest: Any) -> Any:
        return again(block, x_BTD, *rest) if torch.is_grad_enabled() else block(x_BTD, *rest)

    return run


def kept(width: int, operator: Any, arguments: tuple[Any, ...], always: frozenset[str] = ALWAYS_KEPT) -> bool:
    """Whether `selective` saves the result of `operator` in a model of `width`, or as one of `always`."""
    name = operator._schema.name
    if name in ("aten::mm", "aten::addmm"):
        left: Tensor = arguments[0] if name == "aten::mm" else arguments[1]
        return left.shape[-1] >= width
    return name in always


def _plainly(block: nn.Module, x_BTD: Tensor, *rest: Any) -> Any:
    return block(x_BTD, *rest)


def _policy(keep: Callable[..., bool], context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep(operator, arguments) else CheckpointPolicy.PREFER_RECOMPUTE
