"""What ranks that share the experts send each other, from the configuration alone."""

from __future__ import annotations

from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import moe_layers
from kha_train.estimate.memory import micro_batch_tokens, micro_batches, number_bytes


def exchange_bytes(config: RunConfig) -> int:
    """What one rank sends in a step to the other ranks that share its experts, when loads are balanced; 0 without any.

    Each copy of a token is a row of the model's width, and its routing weight in fp32. Rows travel in the forward to
    the expert and back, and so do gradients in the backward; weights travel once in each. Recomputation sends both
    once more; and the results, if shared experts follow, which are recomputed after them.
    """
    engine, model, moe = config.engine, config.model, config.moe
    again = engine.activation_checkpointing != "none"
    rows = 4 + again + (again and moe.shared_experts > 0)
    per_copy = number_bytes(config) * rows * model.hidden_size + 4 * (2 + again)
    copies = micro_batches(config) * micro_batch_tokens(config) * moe.top_k
    return moe_layers(config) * copies * per_copy * (engine.expert_parallel - 1) // engine.expert_parallel
