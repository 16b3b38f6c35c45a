"""The private seams of DeepSpeed that the engine relies on: an upgrade that moves one must fail here first."""

from __future__ import annotations

import inspect
from datetime import timedelta
from importlib import import_module

import pytest
import torch

from kha_train import distributed, open_stream
from kha_train.config.compose import compose
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine, _import_deepspeed, _settings
from kha_train.train.step import next_batch


def source_of(member: object) -> str:
    """The text of a function, also behind DeepSpeed's profiling decorator."""
    closure = getattr(member, "__closure__", None) or ()
    wrapped = [cell.cell_contents for cell in closure if inspect.isfunction(cell.cell_contents)]
    return inspect.getsource(wrapped[0] if wrapped else member).replace("'", '"')


def test_the_switch_that_avoids_compiling_its_own_operators_is_still_read() -> None:
    deepspeed = _import_deepspeed(torch.device("cpu"))
    torch_backend = import_module("deepspeed.comm.torch")

    assert deepspeed.ops.__compatible_ops__ == {}
    assert "deepspeed.ops.__compatible_ops__.get(" in source_of(torch_backend.build_shm_op)
    assert torch_backend.build_shm_op() is None


def test_its_groups_wait_as_long_as_the_settings_say(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given, new_group = [], torch.distributed.new_group
    monkeypatch.setattr(
        torch.distributed, "new_group", lambda *a, **k: given.append(k.get("timeout")) or new_group(*a, **k)
    )
    world = distributed.start("cpu", 60.0)
    engine = Engine(compose([*small, "engine.collective_timeout_seconds=77"]), world)
    engine.close()
    Engine.leave_world()
    assert given and set(given) == {timedelta(seconds=77)}


def test_the_gradient_of_a_share_is_still_taken_as_one_tensor_and_the_other_reduction_is_still_a_switch() -> None:
    _import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "flat_partition" in source_of(DeepSpeedZeroOptimizer._get_preflattened_grad_partition)
    assert "GradPartitionBufferGroup(" in source_of(DeepSpeedZeroOptimizer._build_compact_grad_partition_buffer)
    assert "self._grad_acc_hooks.append(" in source_of(DeepSpeedZeroOptimizer.create_gradient_handling_hooks)
    assert "if self.enable_backward_allreduce" in source_of(DeepSpeedEngine._backward_epilogue)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_reduces_gradients_on_another_stream_under_stage_3_alone(stage: int, small: list[str]) -> None:
    world = World(device=torch.device("cuda"))
    settings = _settings(compose([*small, f"engine.zero_stage={stage}"]), world, torch.bfloat16)
    assert settings["zero_optimization"]["overlap_comm"] is (stage == 3)


def test_each_optimizer_class_still_takes_its_norm_where_the_gate_replaces_it() -> None:
    _import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    step = source_of(DeepSpeedZeroOptimizer.step)
    assert "self.scaled_global_norm(" in step and "self.check_overflow(partition_gradients=" in step
    assert "self._get_norm_groups(" in source_of(DeepSpeedZeroOptimizer_Stage3.step)


@pytest.mark.parametrize("settings", [(1, "bf16"), (2, "bf16"), (2, "fp32")], ids=str)
def test_matrices_of_experts_lie_at_multiples_of_16_bytes_beside_small_odd_ones(settings, small: list[str]) -> None:
    """Each optimizer class packs a group in its own way; a grouped GEMM on CUDA takes nothing else."""
    stage, precision = settings
    heads = ["attention=mea", "model.query_heads=6", "model.kv_heads=3"]
    engine_settings = ["engine.device=cpu", f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    engine = Engine(compose([*small, *heads, *engine_settings]), distributed.start("cpu", 60))
    try:
        named = dict(engine.decoder.named_parameters())
        assert any(matrix.numel() % 8 for matrix in named.values())
        experts = [matrix for name, matrix in named.items() if name.endswith(("gate_up", "down"))]
        assert experts and all(matrix.data_ptr() % 16 == 0 for matrix in experts)
    finally:
        engine.close()
        Engine.leave_world()


def test_zero_3_frees_parameters_during_the_backward_and_not_after_it(small: list[str]) -> None:
    """What is left then stayed gathered, up to the whole model."""
    losses = ["moe.auxiliary_loss.weight=0.01", "moe.z_loss_weight=0.001", "moe.shared_experts=1"]
    config = compose([*small, *losses, "engine.zero_stage=3", "engine.device=cpu"])
    engine = Engine(config, distributed.start("cpu", 60))
    try:
        batch, _ = next_batch(open_stream(config), engine.world)
        engine.accumulate(batch, 1.0, 1.0, last=True)
        waiting = [name for name, module in engine.decoder.named_modules() if getattr(module, "ds_grads_remaining", 0)]
        assert not waiting
    finally:
        engine.close()
        Engine.leave_world()
