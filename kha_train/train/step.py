"""One optimiser step: agree on the batch, accumulate, pass the gate, apply or discard.

There are two agreement points. Before the first forward all ranks learn whether every batch could be read, and the
number of labels of the global batch. After the last backward they learn the loss, the expert loads, whether anyone
wants to stop, and the gradient norm; every rank then makes the same decision. Values that modules report have
all-reduces of their own there: joined with the loads, they might change the order in which ranks' loads are added. A
step with statistics of layers adds one more after its update. Within a long step ranks may agree to abandon it.
"""

# L layers  E experts

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kha_train.config.schema import MoeSection
from kha_train.data.rows.batch import Batch
from kha_train.data.sources import without_labels
from kha_train.data.stream import TokenStream
from kha_train.distributed import Caught, World, as_error
from kha_train.engine.contract import Engine
from kha_train.model.moe.balance import balance_metrics
from kha_train.train import layer_statistics
from kha_train.train.layer_values import StepValues
from kha_train.train.probe import probe
from kha_train.train.watch import Ruling


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank.

    `loss` is the mean cross-entropy in nats over the labels of the global batch, `grad_norm` the norm before clipping
    (inf when not finite), `load_LE` the tokens of each expert of each layer in the global batch and `bias_LE` the
    selection biases used for routing, both fp64 on the host. `balance_loss` and `z_loss` are the unweighted auxiliary
    losses, means over tokens and layers (0 when not used). A step that was not `applied` left no trace in the model.
    `evidence` is the result of `probe` if the judge requested it. `padding` is the share of the global batch's places
    without a token: None if no row of the data can have any. `values` are the entries of the metrics line that the
    modules of the decoder declared.
    """

    loss: float
    grad_norm: float
    applied: bool
    load_LE: Tensor
    bias_LE: Tensor
    balance_loss: float
    z_loss: float
    stop: bool
    evidence: dict[str, Any] | None = None
    padding: float | None = None
    values: dict[str, Any] = field(default_factory=dict)


class StepGivenUp(Exception):
    """Raised by `train_step`, on all ranks together, after an abandoned step has been discarded."""


class Stops(Protocol):
    """Whether to stop, as `train_step` sees it."""

    def pending(self) -> bool:
        """Whether this rank was asked to stop. Checked at the end of a step; all ranks then learn it."""

    def gives_up(self, number: int, of: int) -> bool:
        """Before micro-batch `number` (from 1) of `of`: whether it is the last one and the step will be discarded. The
        same on every rank; never True for the last micro-batch.
        """


class Unasked:
    """The `Stops` of a step that cannot be stopped."""

    def pending(self) -> bool:
        """Always False."""
        return False

    def gives_up(self, number: int, of: int) -> bool:
        """Always False."""
        return False


Judge = Callable[[float, float], Ruling]
"""(loss, gradient norm before clipping) -> what to do; called once per step, on every rank with the same numbers."""


def only_finite(loss: float, grad_norm: float) -> Ruling:
    """The simplest judge: a finite step is applied."""
    return Ruling(math.isfinite(loss) and math.isfinite(grad_norm))


def next_batch(stream: TokenStream, world: World, trouble: BaseException | None = None) -> tuple[Batch, int]:
    """This rank's batch of the next step, which knows the number of tokens of the whole global batch, and the number of
    its unmasked labels.

    Raises on all ranks when any rank could not read its part, or has earlier `trouble`; DataError when the global batch
    has no label. The part of one rank may have none.
    """
    batch, first = None, stream.samples_seen
    with Caught() as caught:
        batch = next(stream)
    error = trouble or (as_error(caught.error, "read the batch") if caught.error else None)
    counts = (batch.label_count, batch.token_count) if batch else (0, 0)
    labels, tokens, failures = world.sum_ints(*counts, int(error is not None))
    if failures:
        world.raise_together(error)
    assert batch is not None
    batch.step_tokens = tokens
    if not labels:
        # All ranks know the sum, so all of them raise this.
        error = without_labels("data", f"no token of samples {first} to {stream.samples_seen - 1}")
        error.agreed = True
        raise error
    return batch, labels


def train_step(
    engine: Engine,
    batch: Batch,
    labels: int,
    lr: float,
    judge: Judge = only_finite,
    stops: Stops = Unasked(),  # noqa: B008 - without state
    observed: bool = False,
) -> StepResult:
    """Train on `batch`, this rank's part of a global batch with `labels` (at least 1) unmasked labels, at rate `lr`.

    `judge` decides whether the update is applied or discarded. A non-finite update is never applied. An `observed` step
    also computes statistics of layers; when it is applied, the host waits for the device once more. Raises StepGivenUp
    on all ranks when `stops` abandons the step, which then leaves no trace.
    """
    world = engine.world
    tokens = batch.step_tokens
    if tokens is None:
        assert batch.real_R is None or world.size == 1, "ranks hold unequal numbers of tokens: they have to agree"
        tokens = batch.token_count * world.size
    assert labels >= 1, "a step has something to predict"
    micro_batches = list(batch.micro_batches(engine.config.engine.micro_batch_size))
    values = StepValues({**engine.decoder.declared, **layer_statistics.DECLARED})
    engine.decoder.observed = observed
    try:
        sums, load_LE = _accumulate(engine, micro_batches, (world.size / labels, world.size / tokens), stops, values)
    finally:
        engine.decoder.observed = False
    if observed:
        values.add(layer_statistics.gradient_norms(engine))

    stop = torch.full_like(sums[:1], float(stops.pending()))
    agreed = world.sum_(torch.cat([sums, stop, load_LE.flatten()]))
    load_LE = agreed[4:].view_as(load_LE)
    bias_LE = engine.decoder.selection_bias_LE()
    # Everything that the host needs to know about a step is transferred here, at the only point where it waits for the
    # device.
    parts = [engine.gradient_norm.double().view(1), agreed, bias_LE.double().flatten(), values.agreed(world)]
    known = torch.cat(parts).cpu()
    grad_norm, loss_total, balance_total, z_total, asked = known[:5].tolist()
    seen_LE, routed_by_LE = known[5 : 5 + 2 * load_LE.numel()].view(2, *load_LE.shape)
    entries = values.entries(known[5 + 2 * load_LE.numel() :])

    loss = loss_total / labels
    routed = tokens * max(load_LE.shape[0], 1)
    grad_norm = grad_norm if math.isfinite(grad_norm) else math.inf
    ruling = judge(loss, grad_norm)
    evidence = probe(engine, micro_batches[0], seen_LE) if ruling.probe else None
    applied = ruling.apply and only_finite(loss, grad_norm).apply
    if applied:
        entries |= _apply(engine, lr, ruling.max_norm, observed)
        engine.decoder.finish_step(load_LE)
    else:
        engine.discard()
    losses = balance_total / routed, z_total / routed
    padding = None if batch.real_R is None else 1 - tokens / (batch.tokens_BT.numel() * world.size)
    return StepResult(loss, grad_norm, applied, seen_LE, routed_by_LE, *losses, asked > 0, evidence, padding, entries)


def _accumulate(
    engine: Engine, micro_batches: list[Batch], scales: tuple[float, float], stops: Stops, values: StepValues
) -> tuple[Tensor, Tensor]:
    """Forward and backward of each micro-batch, whose `values` are added up. Returns the sums of this rank, fp64 on the
    device: cross-entropy, balance loss and z-loss, and the loads [L, E]. Raises StepGivenUp."""
    world = engine.world
    sums, load_LE = torch.zeros(3, dtype=torch.float64, device=world.device), None
    for number, micro_batch in enumerate(micro_batches, start=1):
        given_up = stops.gives_up(number, len(micro_batches))
        output = engine.accumulate(micro_batch, *scales, last=given_up or number == len(micro_batches))
        world.alive()
        if given_up:
            engine.discard()
            raise StepGivenUp(f"after micro-batch {number} of {len(micro_batches)}")
        assert output.loss_sum is not None, "the batch has labels"
        sums[0] += output.loss_sum.detach()
        if output.auxiliary is not None:
            sums[1:] += torch.stack([output.auxiliary.balance_sum, output.auxiliary.z_sum])
        load_LE = output.load_LE.double() if load_LE is None else load_LE + output.load_LE
        values.add(output.values)
    assert load_LE is not None, "a step has at least one micro-batch"
    return sums, load_LE


def _apply(engine: Engine, lr: float, max_norm: float, observed: bool) -> dict[str, Any]:
    """Step at rate `lr`; of an `observed` step, the entries that tell what it changed in the weights."""
    if not observed:
        engine.apply(lr, max_norm)
        return {}
    squares, values = layer_statistics.LayerSquares(engine), StepValues(layer_statistics.DECLARED)
    engine.apply(lr, max_norm, squares.add)
    values.add(squares.values(layer_statistics.UPDATE_NORM))
    return values.entries(values.agreed(engine.world).cpu())


def routing_metrics(moe: MoeSection, result: StepResult) -> dict[str, Any]:
    """The `moe/` entries of the step's line in the record: balance, and the auxiliary losses that are on."""
    metrics: dict[str, Any] = balance_metrics(result.load_LE, result.bias_LE)
    metrics |= {"moe/auxiliary_loss": result.balance_loss} if moe.auxiliary_loss.weight else {}
    return metrics | ({"moe/z_loss": result.z_loss} if moe.z_loss_weight else {})
