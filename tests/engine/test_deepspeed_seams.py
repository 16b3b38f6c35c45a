"""The private seams of DeepSpeed that the engine relies on: an upgrade that moves one must fail here first."""

from __future__ import annotations

import inspect

import torch

from kha_train.engine.deepspeed import _import_deepspeed


def test_the_switch_that_avoids_compiling_a_shared_memory_extension_is_still_read() -> None:
    deepspeed = _import_deepspeed(torch.device("cpu"))
    from deepspeed.comm import torch as torch_backend

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert '__compatible_ops__["deepspeed_shm_comm"]' in inspect.getsource(torch_backend.build_shm_op).replace("'", '"')


def test_each_optimizer_class_still_takes_its_norm_where_the_gate_replaces_it() -> None:
    _import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "self.scaled_global_norm(" in inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert "self._get_norm_groups(" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3.step)
    assert "get_global_norm_of_tensors(" in inspect.getsource(bf16_optimizer.BF16_Optimizer.step)
