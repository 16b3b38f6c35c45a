"""One optimiser step: agree on the batch, accumulate, pass the gate, apply or discard.

Two agreement points. Before the first forward all ranks learn whether every batch could be read, and how many labels
the global batch holds. After the last backward they learn the loss, the expert loads and whether anyone wants to stop,
beside the gradient norm; every rank then takes the same decision.
"""

# L layers  E experts

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kha_train.data.stream import Batch, TokenStream
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine
from kha_train.errors import DataError


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on every rank.

    `loss` is the mean cross-entropy in nats over the labels of the global batch, `grad_norm` the norm before clipping
    (inf when not finite), `load_LE` the tokens each expert of each layer got in the global batch. When not `applied`,
    the step left no trace in the model.
    """

    loss: float
    grad_norm: float
    applied: bool
    load_LE: Tensor
    stop: bool


def next_batch(stream: TokenStream, world: World) -> tuple[Batch, int]:
    """This rank's batch of the next step and the unmasked labels of the whole global batch.

    Raises DataError on all ranks when any rank could not read its part.
    """
    batch, error = None, None
    try:
        batch = next(stream)
    except DataError as found:
        error = found
    counts = torch.tensor([batch.label_count if batch else 0, int(error is not None)], device=world.device)
    labels, failures = world.sum_(counts).tolist()
    if failures:
        world.raise_together(error)
    assert batch is not None
    return batch, labels


def train_step(engine: Engine, batch: Batch, labels: int, lr: float, stop_requested: bool) -> StepResult:
    """Train on `batch`, this rank's part of a global batch with `labels` unmasked labels, at rate `lr`.

    The step is applied when loss and gradient norm are finite, and discarded otherwise.
    """
    world, micro_size = engine.world, engine.config.engine.micro_batch_size
    micro_batches = list(batch.micro_batches(micro_size))
    loss_scale = world.size / max(labels, 1)
    loss_sum, load_LE = torch.zeros((), dtype=torch.float64, device=world.device), None
    for number, micro_batch in enumerate(micro_batches, start=1):
        output = engine.accumulate(micro_batch, loss_scale, last=number == len(micro_batches))
        loss_sum += output.loss_sum.detach()
        load_LE = output.load_LE.double() if load_LE is None else load_LE + output.load_LE
    assert load_LE is not None, "a step has at least one micro-batch"

    stop = torch.tensor(float(stop_requested), dtype=torch.float64, device=world.device)
    agreed = world.sum_(torch.cat([loss_sum.view(1), stop.view(1), load_LE.flatten()]))
    load_LE = agreed[2:].view_as(load_LE)
    loss_total, stops, grad_norm = torch.stack([agreed[0], agreed[1], engine.gradient_norm.double()]).tolist()

    loss = loss_total / max(labels, 1)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        engine.apply(lr)
        engine.decoder.update_selection_bias(load_LE)
    else:
        engine.discard()
    return StepResult(loss, grad_norm, finite, load_LE, stops > 0)
