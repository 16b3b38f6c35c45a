"""The contract between an engine and its users: the loop, saving, the probe, the audit, resume and evaluation.

An engine holds a decoder, its fp32 master weights and the optimiser's state, sharded over ranks in its own way. A step
is `accumulate` for each micro-batch, then `apply` or `discard`. Checkpoints are made of `fragments` and `buffers`, and
written back into them. Nothing else of an engine is used outside this room.

`deepspeed.Engine` is for training; `plain.Engine` is one process without DeepSpeed, for tests and as a reference.
Another engine is a package of this room with a class `Engine`. `engine.name` selects one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.model.decoder import Decoder, DecoderOutput

InitialValue = Callable[[str, Callable[[], Tensor]], Tensor]
"""The initial value of a parameter, from its name and a function that returns its default."""


Changed = Callable[[str, Tensor], None]
"""Takes the name of a parameter and the change of a part of its master, fp32 and 1-D."""


def seeded(name: str, default: Callable[[], Tensor]) -> Tensor:
    """The initial value that the run's seed gives to the parameter `name`."""
    return default()


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one parameter that this rank owns, as live 1-D views of the engine's state by kind.

    `start` counts elements of the flattened parameter of global `shape`. `views["master"]` is fp32; the others are the
    optimiser's states, fp32 or bf16 (`engine.moment_dtype`). The master begins at `offset` of `flat`, the tensor that
    the optimiser steps.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    views: dict[str, Tensor]
    flat: Tensor
    offset: int


class Engine(Protocol):
    """A decoder that is trained step by step: accumulate micro-batches, read the norm, then `apply` or `discard`.

    Every rank must call methods marked collective, in the same order.
    """

    config: RunConfig
    world: World
    decoder: Decoder
    """The module itself. Its parameters may be empty between calls (ZeRO 3): read values from `fragments`."""

    def __init__(
        self, config: RunConfig, world: World, initial: InitialValue = seeded, resolved: Resolved | None = None
    ) -> None:
        """Build the decoder with the values of `initial`, and zero optimiser states. Collective.

        `resolved` says what computes it on the device of `world`; without it, `config` is resolved there. Raises as
        `resolve`.
        """
        ...

    @staticmethod
    def refuses(config: RunConfig, ranks: int) -> ConfigError | None:
        """Why this engine cannot train `config` on `ranks` ranks, or None. Called before anything is built."""
        ...

    @staticmethod
    def leave_world(error: BaseException | None = None) -> None:
        """Leave the process group after the last engine of this process, or after one that could not be built; after an
        `error` as `distributed.stop`.
        """
        ...

    def accumulate(self, batch: Batch, loss_scale: float, token_scale: float, last: bool) -> DecoderOutput:
        """Forward and backward of one micro-batch; `last` marks the last of the step. Collective.

        The gradient is that of `loss_sum * loss_scale`, averaged over ranks: with `loss_scale` = ranks / labels of the
        global batch, a step is the mean over all its labels. Auxiliary losses are sums over tokens, including those
        with a masked label but not padding: `token_scale` = ranks / tokens of the global batch. A `batch` of parts of
        rows is computed with the ranks that have the other parts (`engine.context_parallel`).
        """
        ...

    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """Forward without gradient: the loss of `batch`, or with `by_token` the score of each label. Collective: every
        rank must call it the same number of times.
        """
        ...

    @property
    def gradient_norm(self) -> Tensor:
        """L2 norm of the step's whole gradient before clipping, after the last micro-batch; inf when not finite."""
        ...

    def gradient_norms(self) -> dict[str, float]:
        """The norm before clipping of each parameter group (the matrices of one layer; all vectors), between the last
        micro-batch and the step; inf when not finite. Collective, and waits for the device.
        """
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the gradient before clipping, by parameter name. Valid between the last micro-batch and
        the step.

        Over all ranks, each element of each parameter occurs exactly once.
        """
        ...

    def apply(self, lr: float, max_norm: float = math.inf, changed: Changed | None = None) -> None:
        """Clip, step every parameter at rate `lr` (times the `lr_scale` of its group), clear the gradients. Collective.

        The gradient is scaled to `optim.grad_clip` or `max_norm`, whichever is less, when its norm is above that.
        `changed` is called with every part of a parameter that this rank owns, and with the change of its fp32 master.
        """
        ...

    def discard(self) -> None:
        """Discard the step: masters, states and all later steps are bit-identical to those without it. Collective."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The global shape of every parameter by name, tied ones once, in the order of the decoder."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """The fp32 state this rank owns: over all ranks, each element of each parameter occurs once."""
        ...

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers by name, as live tensors: selection biases and the like, equal on all ranks."""
        ...

    def held_weights(self) -> dict[str, Tensor]:
        """What this rank keeps of each parameter between steps: the whole, or its share."""
        ...

    def refresh_parameters(self) -> None:
        """Copy the fp32 masters into the parameters after they were written from outside. Collective."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Number of steps the optimiser has taken, without skipped ones. Set when a checkpoint is restored."""
        ...

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None: ...

    def close(self) -> None:
        """Release the engine's resources, so that another one can be built in this process."""
        ...
