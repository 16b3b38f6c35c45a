"""DeepSpeed ZeRO 1, 2, 3 around a decoder, with the step split so that it can still be discarded.

The only user of DeepSpeed. It adds to DeepSpeed 0.19:

- the decoder is built on `meta` and materialised one parameter at a time: no rank ever holds the whole model in fp32;
- the loss of a step is a sum over the global batch, so nothing depends on micro-batch, accumulation or world size;
- the true global gradient norm is known *before* the step, and `discard` leaves masters, moments and every later step
  as if the batch had never been seen. DeepSpeed itself skips a step only when its own norm is not finite, and each of
  its two optimizer classes computes that norm elsewhere: `_step_with_norm` passes it the norm to use;
- gradients of ZeRO 1 and 2 are reduced to shares beside the backward (`reduction.py`);
- with `engine.expert_parallel` its expert groups, made for its own layers, hold our experts (`expert_groups.py`).
"""

from __future__ import annotations

import gc
import inspect
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from kha_train.collectives import all_gather, ordered_reduce_scatter
from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.distributed import World, stop
from kha_train.engine.building import (
    build_optimizer,
    check_buffers_are_wide,
    materialise,
    persistent_buffers,
    prepare_device,
    scaled_loss,
    spare_optimizers_the_compiler,
    start_optimizer,
    told_of_changes,
)
from kha_train.engine.contract import Changed, Fragment, InitialValue, seeded
from kha_train.engine.expert_groups import group_name, layer_of, mark_experts
from kha_train.engine.reduction import Reduction
from kha_train.engine.settings import deepspeed_settings as _settings
from kha_train.engine.zero_state import owned_gradients, partitioned_fragments, replicated_fragments
from kha_train.errors import ConfigError
from kha_train.model.attention.context import ContextRanks, context_ranks
from kha_train.model.decoder import DecoderOutput
from kha_train.model.device import DTYPES, resolve_on
from kha_train.model.host import inputs_of
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.parallel import ExpertRanks
from kha_train.optim import ShareOptimizer

INVALID_NORM = -1.0


class Engine:
    """A decoder under ZeRO, see `contract.Engine`. `decoder` is partitioned under ZeRO 3."""

    def __init__(
        self, config: RunConfig, world: World, initial: InitialValue = seeded, resolved: Resolved | None = None
    ) -> None:
        self.config, self.world = config, world
        resolved = resolved or resolve_on(config, world.device)
        self.dtype = DTYPES[resolved.precision]
        prepare_device(world, self.dtype)
        self._deepspeed = _import_deepspeed(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        self._deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
        self._norm: Tensor | None = None
        settings = _settings(config, world, self.dtype)

        def keep(parameter: nn.Parameter) -> None:
            if config.engine.zero_stage == 3:
                self._partition(parameter, settings)

        timeout = timedelta(seconds=config.engine.collective_timeout_seconds)
        self._context = context_ranks(world, config.engine.context_parallel, timeout)
        with redirect_stdout(io.StringIO()), _patient_groups(config.engine.collective_timeout_seconds):
            self._ranks = self._expert_ranks()
            self.decoder, self.shapes = materialise(config, resolved, world, initial, keep, self._ranks)
            self._starts = mark_experts(self.decoder, self._ranks) if self._ranks else {}
            stepper = build_optimizer(config, self.decoder, self.decoder.named_parameters(), self.shapes)
            with self._experts_recognised():
                self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                    model=self.decoder, optimizer=stepper, config=settings, dist_init_required=False
                )
        self._reduction = self._own_reduction()
        start_optimizer(self, self._stepper, self._flat_masters())
        check_buffers_are_wide(self.decoder)

    @staticmethod
    def refuses(config: RunConfig, ranks: int) -> ConfigError | None:
        """See `contract.Engine.refuses`. `validate` refuses what it cannot do, for any number of ranks."""
        return None

    @staticmethod
    def leave_world(error: BaseException | None = None) -> None:
        """Leave the process group and DeepSpeed's subgroups, so that this process can join another later; after an
        `error` as `distributed.stop`.
        """
        import deepspeed

        stop(error)
        deepspeed.utils.groups._release_process_group_references(group=None)
        # An engine is full of reference cycles; the threads of a group end with the last reference to it.
        gc.collect()

    def accumulate(self, batch: Batch, loss_scale: float, token_scale: float, last: bool) -> DecoderOutput:
        """See `contract.Engine.accumulate`."""
        self._engine.set_gradient_accumulation_boundary(last)
        output: DecoderOutput = self._engine(*inputs_of(batch, self.world.device), context=self._context_of(batch))
        with self._reduction.beside_backward(last) if self._reduction else nullcontext():
            self._engine.backward(scaled_loss(output, loss_scale, token_scale), scale_wrt_gas=False)
        if last:
            self._norm = self._norm_before_step()
        return output

    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `contract.Engine.evaluate`. ZeRO 3, shared experts and shared rows make it collective."""
        self._engine.eval()
        with torch.no_grad():
            inputs, context = inputs_of(batch, self.world.device), self._context_of(batch)
            output: DecoderOutput = self._engine(*inputs, by_token=by_token, context=context)
        self._engine.train()
        return output

    @property
    def gradient_norm(self) -> Tensor:
        """See `contract.Engine.gradient_norm`."""
        assert self._norm is not None, "the step has no last micro-batch yet"
        return torch.where(self._norm < 0, torch.inf, self._norm)

    def gradient_norms(self) -> dict[str, float]:
        """See `contract.Engine.gradient_norms`."""
        squares: dict[str, float] = {}
        for number, norm in enumerate(self._group_norms()):
            name = layer_of(self._optimizer.param_groups[self._group_of(number)])
            value = float(norm)
            squares[name] = squares.get(name, 0.0) + (value * value if value >= 0 else math.inf)
        return {name: math.sqrt(square) for name, square in squares.items()}

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `contract.Engine.gradients`."""
        return owned_gradients(self._optimizer, self.decoder, self.config.engine.zero_stage)

    def apply(self, lr: float, max_norm: float = math.inf, changed: Changed | None = None) -> None:
        """See `contract.Engine.apply`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        assert self._norm is not None
        skipped = self._engine.skipped_steps
        # DeepSpeed scales by grad_clip / norm; a norm larger by this factor gives max_norm / norm.
        norm = self._norm * max(1.0, self.config.optim.grad_clip / max_norm)
        with told_of_changes(self._stepper, self.fragments(), changed):
            self._step_with_norm(norm)
        assert self._engine.skipped_steps == skipped, "DeepSpeed skipped a step that the gate had accepted"

    def discard(self) -> None:
        """See `contract.Engine.discard`."""
        skipped = self._engine.skipped_steps
        assert self._norm is not None, "the step has no last micro-batch yet"
        self._step_with_norm(torch.full_like(self._norm, INVALID_NORM))
        assert self._engine.skipped_steps == skipped + 1, "DeepSpeed applied a step that the gate had refused"

    def fragments(self) -> Iterator[Fragment]:
        """See `contract.Engine.fragments`."""
        if self.config.engine.zero_stage == 3:
            return partitioned_fragments(self._optimizer, self.decoder, self.shapes, self.world.rank)
        return replicated_fragments(self._optimizer, self.decoder, self.shapes, self._flat_masters(), self._starts)

    def buffers(self) -> dict[str, Tensor]:
        """See `contract.Engine.buffers`."""
        return persistent_buffers(self.decoder)

    def held_weights(self) -> dict[str, Tensor]:
        """See `contract.Engine.held_weights`: under ZeRO 3 this rank's share."""
        return {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in self.decoder.named_parameters()}

    def refresh_parameters(self) -> None:
        """See `contract.Engine.refresh_parameters`."""
        optimizer = self._optimizer
        if self.config.engine.zero_stage < 3:
            optimizer.update_lp_params()
            return
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        # With `hpz_partition_size` forwards gather from a second copy of the weights, made from their old values.
        optimizer.invalidate_secondary_tensor()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @property
    def optimizer_steps(self) -> int:
        """See `contract.Engine.optimizer_steps`."""
        return self._stepper.steps

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        self._stepper.steps = count

    def close(self) -> None:
        """Release hooks and communication buffers, so that another engine can be built in this process.

        A reference to a process group keeps its threads alive, and a group that is alive when the interpreter ends can
        abort the process. Under ZeRO 3 DeepSpeed keeps references to an engine in a list and in a cache of its modules.
        """
        if self._reduction:
            self._reduction.close()
        self._engine.destroy()
        zero = self._deepspeed.runtime.zero
        zero.parameter_offload.FWD_MODULE_STACK.clear()
        coordinator = zero.partitioned_param_coordinator.PartitionedParameterCoordinator
        released = coordinator._PartitionedParameterCoordinator__params_to_release
        released.__closure__[0].cell_contents.cache_clear()
        del self._engine, self._optimizer, self._reduction, self.decoder

    @property
    def _stepper(self) -> ShareOptimizer:
        """Our optimiser, which DeepSpeed's wraps."""
        stepper: ShareOptimizer = self._optimizer.optimizer
        return stepper

    def _own_reduction(self) -> Reduction | None:
        """The reduction of ZeRO 1 and 2, in place of DeepSpeed's; None under ZeRO 3."""
        stage = self.config.engine.zero_stage
        if stage == 3:
            return None
        self._engine.enable_backward_allreduce = False
        # In bf16 it would search all gradients for what is not finite, which the norm tells.
        self._optimizer.check_overflow = lambda partition_gradients: None
        return Reduction(self._optimizer, self.decoder, self.world.size, each_micro_batch=stage == 2)

    def _context_of(self, batch: Batch) -> ContextRanks | None:
        """The ranks with which this one shares the rows of `batch`; None for whole rows."""
        return self._context if batch.part[1] > 1 else None

    def _partition(self, parameter: nn.Parameter, settings: dict[str, Any]) -> None:
        """Keep this rank's share of a ZeRO 3 parameter and free the rest. Buffers are never passed here: they stay
        fp32.
        """
        holder = nn.Module()
        holder.parameter = parameter
        self._deepspeed.zero.Init(
            module=holder,
            config_dict_or_path=settings,
            dtype=self.dtype,
            mem_efficient_linear=False,
            # The first parameter creates the groups of `hpz_partition_size` ranks, the others join theirs.
            zero_param_parallel_group=self._deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
        )

    def _flat_masters(self) -> list[Tensor]:
        """The flat fp32 tensor that this rank owns of each parameter group, as our optimiser sees it."""
        optimizer = self._optimizer
        if self.config.engine.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _norm_before_step(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        # The norm of an expert's gradient, too, is its true one: DeepSpeed averages those of different experts.
        norm = combine_grad_norm_groups(self._group_norms())
        return torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)

    def _group_norms(self) -> list[Tensor]:
        """One norm per parameter group or, under ZeRO 3, per sub-group."""
        optimizer = self._optimizer
        if self.config.engine.zero_stage == 3:
            norms: list[Tensor] = optimizer._get_norm_groups()
            return norms
        parts = enumerate(optimizer.params_in_partition)
        return [optimizer.get_grad_norm_direct(optimizer.averaged_gradients[i], part) for i, part in parts]

    def _group_of(self, number: int) -> int:
        """The parameter group of the norm at `number`."""
        return self._optimizer.sub_group_to_group_id[number] if self.config.engine.zero_stage == 3 else number

    def _step_with_norm(self, norm: Tensor) -> None:
        replacement: tuple[str, Callable[..., Tensor | list[Tensor]]]
        if self.config.engine.zero_stage == 3:
            replacement = "_get_norm_groups", lambda: [norm]
        else:
            replacement = "scaled_global_norm", lambda norm_type=2: norm
        with _replaced(self._optimizer, *replacement):
            self._engine.step()
        self._norm = None

    def _expert_ranks(self) -> ExpertRanks | None:
        """The ranks with which this one shares the experts; None when each holds all of them. Collective."""
        size = self.config.engine.expert_parallel
        if size == 1:
            return None
        groups = self._deepspeed.utils.groups
        groups._create_expert_and_data_parallel(size)
        group = groups._get_expert_parallel_group(group_name(size))
        return ExpertRanks(group, torch.distributed.get_rank(group), size)

    def _experts_recognised(self) -> AbstractContextManager[None]:
        """DeepSpeed recognises layers with experts by their class, and fails if there are any without expert groups."""
        engine = self._deepspeed.runtime.engine
        return _replaced(engine, "MoE", Experts if self._ranks else engine.MoE)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed without its log output and its own operators, which would be compiled at the first start."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    with _silenced_stderr():
        import deepspeed
        from deepspeed.comm.torch import TorchBackend

        # Otherwise it probes its own operators, none of which is used, one by one with a compiler.
        deepspeed.ops.__compatible_ops__ = {}
        # Its Muon optimizer, which is not used here, needs a compiler at import.
        with _replaced(torch, "compile", lambda function=None, **_: function or (lambda kept: kept)):
            import deepspeed.runtime.zero.muon.muon_optimizer
    spare_optimizers_the_compiler()
    # Their defaults keep the world group from the time of the import; None stands for the current one.
    for name in ("barrier", "monitored_barrier"):
        function = inspect.unwrap(vars(TorchBackend)[name])
        function.__defaults__ = (None, *(function.__defaults__ or ())[1:])
    if device.type == "cpu":
        TorchBackend.get_reduce_scatter_function = lambda self: ordered_reduce_scatter
        TorchBackend.get_all_gather_function = lambda self: all_gather
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    return deepspeed


@contextmanager
def _patient_groups(seconds: float) -> Iterator[None]:
    """While DeepSpeed makes its groups: it would give them torch's own timeout, which may end a process before the
    watchdog reports the hang.
    """
    from deepspeed.comm.torch import TorchBackend

    def new_group(_: Any, ranks: list[int]) -> Any:
        return torch.distributed.new_group(ranks, timeout=timedelta(seconds=seconds))

    with _replaced(TorchBackend, "new_group", new_group):
        yield


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """While DeepSpeed searches for libraries at import: the linker it starts complains about missing ones."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(place).get(name, missing)
    setattr(place, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(place, name)
        else:
            setattr(place, name, before)
