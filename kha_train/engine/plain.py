"""The contract of an engine in plain PyTorch and one process: for tests, and as a reference for the other engine.

Each parameter has its own fp32 master, which the optimiser steps; nothing is sharded, reduced or overlapped.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

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
from kha_train.errors import ConfigError, Settings
from kha_train.model.decoder import DecoderOutput
from kha_train.model.device import DTYPES, resolve_on
from kha_train.model.host import inputs_of


class Engine:
    """A decoder in one process, see `contract.Engine`. `engine.zero_stage` and bucket sizes have no effect here."""

    def __init__(
        self, config: RunConfig, world: World, initial: InitialValue = seeded, resolved: Resolved | None = None
    ) -> None:
        assert world.size == 1, "the plain engine runs in one process"
        self.config, self.world = config, world
        resolved = resolved or resolve_on(config, world.device)
        self.dtype = DTYPES[resolved.precision]
        prepare_device(world, self.dtype)
        spare_optimizers_the_compiler()
        self.decoder, self.shapes = materialise(config, resolved, world, initial)
        self._norm: Tensor | None = None
        self._masters = {
            name: nn.Parameter(parameter.detach().flatten().to(torch.float32, copy=True))
            for name, parameter in self.decoder.named_parameters()
        }
        self._optimizer = build_optimizer(config, self.decoder, self._masters.items(), self.shapes)
        start_optimizer(self, self._optimizer, list(self._masters.values()))
        check_buffers_are_wide(self.decoder)

    @staticmethod
    def refuses(config: RunConfig, ranks: int) -> ConfigError | None:
        """See `contract.Engine.refuses`. It refuses more than one process."""
        if ranks == 1:
            return None
        return ConfigError(
            f"the plain engine runs in one process, not {ranks}",
            field="engine.name",
            value=config.engine.name,
            fix=Settings("engine.name=deepspeed"),
        )

    @staticmethod
    def leave_world(error: BaseException | None = None) -> None:
        """See `contract.Engine.leave_world`."""
        stop(error)
        gc.collect()

    def accumulate(self, batch: Batch, loss_scale: float, token_scale: float, last: bool) -> DecoderOutput:
        """See `contract.Engine.accumulate`."""
        output: DecoderOutput = self.decoder(*inputs_of(batch, self.world.device))
        scaled_loss(output, loss_scale, token_scale).backward()
        if last or self.config.engine.grad_accum_dtype == "fp32":
            self._collect_gradients()
        if last:
            norms = [master.grad.norm() for master in self._masters.values() if master.grad is not None]
            norm = torch.stack(norms).norm()
            self._norm = torch.where(norm.isfinite(), norm, torch.inf)
        return output

    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `contract.Engine.evaluate`."""
        self.decoder.eval()
        with torch.no_grad():
            output: DecoderOutput = self.decoder(*inputs_of(batch, self.world.device), by_token=by_token)
        self.decoder.train()
        return output

    @property
    def gradient_norm(self) -> Tensor:
        """See `contract.Engine.gradient_norm`."""
        assert self._norm is not None, "the step has no last micro-batch yet"
        return self._norm

    def gradient_norms(self) -> dict[str, float]:
        """See `contract.Engine.gradient_norms`."""
        norms = {}
        for group in self._optimizer.param_groups:
            norm = float(torch.stack([master.grad.norm() for master in group["params"]]).norm())
            norms[group["name"]] = norm if math.isfinite(norm) else math.inf
        return norms

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `contract.Engine.gradients`."""
        for name, master in self._masters.items():
            assert master.grad is not None, "the step has no last micro-batch yet"
            yield name, master.grad

    @torch.no_grad()
    def apply(self, lr: float, max_norm: float = math.inf, changed: Changed | None = None) -> None:
        """See `contract.Engine.apply`."""
        limit = min(self.config.optim.grad_clip, max_norm)
        scale = (limit / (self.gradient_norm + 1e-6)).clamp(max=1.0)
        for master in self._masters.values():
            assert master.grad is not None
            master.grad.mul_(scale)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with told_of_changes(self._optimizer, self.fragments(), changed):
            self._optimizer.step()
        self._forget_gradients()
        self.refresh_parameters()

    def discard(self) -> None:
        """See `contract.Engine.discard`."""
        self._forget_gradients()

    def fragments(self) -> Iterator[Fragment]:
        """See `contract.Engine.fragments`."""
        for name, master in self._masters.items():
            yield Fragment(name, self.shapes[name], 0, self._optimizer.kept(master), master, 0)

    def buffers(self) -> dict[str, Tensor]:
        """See `contract.Engine.buffers`."""
        return persistent_buffers(self.decoder)

    def held_weights(self) -> dict[str, Tensor]:
        """See `contract.Engine.held_weights`: all of them."""
        return dict(self.decoder.named_parameters())

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """See `contract.Engine.refresh_parameters`."""
        for name, parameter in self.decoder.named_parameters():
            parameter.copy_(self._masters[name].view(parameter.shape))

    @property
    def optimizer_steps(self) -> int:
        """See `contract.Engine.optimizer_steps`."""
        return self._optimizer.steps

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        self._optimizer.steps = count

    def close(self) -> None:
        """See `contract.Engine.close`."""
        del self.decoder, self._masters, self._optimizer

    def _collect_gradients(self) -> None:
        """Add the gradients of the parameters to those of the masters. An unused parameter counts as zero."""
        for name, parameter in self.decoder.named_parameters():
            master = self._masters[name]
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if parameter.grad is not None:
                master.grad += parameter.grad.flatten()
                parameter.grad = None

    def _forget_gradients(self) -> None:
        for held in (*self._masters.values(), *self.decoder.parameters()):
            held.grad = None
        self._norm = None
