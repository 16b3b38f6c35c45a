"""DeepSpeed's settings for a run. Needs no DeepSpeed import."""

from __future__ import annotations

from typing import Any

import torch

from kha_train.config.schema import RunConfig
from kha_train.distributed import World


def deepspeed_settings(config: RunConfig, world: World, dtype: torch.dtype) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, for parameters of `dtype`."""
    # DeepSpeed is not told that ranks share rows: it counts each part of a row as a row. Nor that steps differ in size:
    # the engine says which micro-batch is the last of a step.
    engine, rows = config.engine, config.data.batch_sizes.largest * config.engine.context_parallel
    stage = {
        # ZeRO 1 and 2 differ in the reduction alone, which is ours (`reduction.py`).
        "stage": max(engine.zero_stage, 2),
        "overlap_comm": world.device.type == "cuda" and engine.zero_stage == 3,
        "reduce_bucket_size": engine.reduce_bucket_elements,
        # ZeRO 1 and 2 shard it in pairs of numbers, so the size must be even.
        "allgather_bucket_size": engine.reduce_bucket_elements + engine.reduce_bucket_elements % 2,
        "memory_efficient_linear": False,
        "sub_group_size": 500_000_000,
        "zero_hpz_partition_size": engine.hpz_partition_size,
    }
    settings = {
        "train_batch_size": rows,
        "train_micro_batch_size_per_gpu": engine.micro_batch_size,
        "gradient_accumulation_steps": rows // (engine.micro_batch_size * world.size),
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": engine.grad_accum_dtype, "keep_in_fp32_modules": ["*"]}
    return settings
