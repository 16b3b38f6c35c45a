"""What ranks send each other in a step for weights, gradients and experts, and what the backward hides of it, from the
configuration alone.

Collectives are rings: for S bytes each of N ranks sends S (N - 1) / N in a reduce-scatter or an all-gather. On CUDA
ZeRO 3 runs beside the computation too, but by DeepSpeed's order, which is not modelled: nothing of it counts as hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import count_parameters, flops_per_token, held_parameters
from kha_train.estimate.exchange import exchange_bytes
from kha_train.estimate.memory import micro_batches, number_bytes

REUSED_PARAMETERS = 500_000_000
"""ZeRO 3 releases no parameter that is used again within 1e9 numbers (DeepSpeed's default): of a forward the last half
of that stays for the backward.
"""
BACKWARD = {"none": 2 / 3, "selective": 2 / 3, "full": 3 / 4}
"""The share of a micro-batch's computation in its backward, by `engine.activation_checkpointing`."""


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in a step under a ZeRO stage, and the seconds this takes on the slowest link it crosses
    (None: unknown). `group_bytes_per_step` of those bytes stay inside groups of `engine.hpz_partition_size` ranks,
    `exchange_bytes_per_step` carry tokens to their experts and back, inside groups of `engine.expert_parallel` ranks,
    and `hidden_bytes_per_step` are gradients that leave while the backward computes. The computation waits for
    `exposed_seconds_per_step`: all but what hides behind it.
    """

    stage: int
    bytes_per_step: int
    seconds_per_step: float | None
    group_bytes_per_step: int = 0
    exchange_bytes_per_step: int = 0
    hidden_bytes_per_step: int = 0
    exposed_seconds_per_step: float | None = None

    @property
    def hidden_seconds(self) -> float | None:
        """What the backward hides of a step's communication; None where it is unknown."""
        total, exposed = self.seconds_per_step, self.exposed_seconds_per_step
        return None if total is None or exposed is None else total - exposed


def communication(config: RunConfig, stage: int, computed: float | None) -> Communication:
    """The traffic of `config` under a ZeRO `stage`, when a step computes for so many seconds (None: unknown).

    Ranks gather the updated parameters once a step. They reduce-scatter gradients in the training dtype: ZeRO 1 once a
    step, ZeRO 2 in every micro-batch. ZeRO 3 does so too, and gathers parameters in every micro-batch, for the forward
    and again for the backward. With `hpz_partition_size` only the first gather of a step is among all ranks; the others
    stay inside each group.
    """
    if stage == 3:
        return _gathered(config)
    ranks, micro, width = config.cluster.devices, micro_batches(config), number_bytes(config)
    spread, (everywhere, shared) = config.engine.expert_parallel, held_parameters(config)
    # A rank's part of the experts travels among the ranks that hold the same part.
    once = width * (_ring(everywhere, ranks) + _ring(shared, max(ranks // spread, 1)))
    reductions = micro if stage == 2 else 1
    exchanged = exchange_bytes(config) if spread > 1 else 0
    weights, tokens = _seconds(config, (reductions + 1) * once, ranks), _seconds(config, exchanged, spread)
    total = None if weights is None or tokens is None else weights + tokens
    hidden = round(once * _leaving_early(config))
    each = _seconds(config, hidden, ranks)
    exposed = None
    if total is not None and each is not None and computed is not None:
        exposed = total - reductions * min(each, _seconds_beside(config, computed / micro))
    return Communication(
        stage,
        bytes_per_step=(reductions + 1) * once + exchanged,
        seconds_per_step=total,
        exchange_bytes_per_step=exchanged,
        hidden_bytes_per_step=reductions * hidden,
        exposed_seconds_per_step=exposed,
    )


def _gathered(config: RunConfig) -> Communication:
    ranks, micro, width = config.cluster.devices, micro_batches(config), number_bytes(config)
    total, group = count_parameters(config).total, config.engine.hpz_partition_size
    gathers = micro * (2 * total - min(total, REUSED_PARAMETERS))
    wide = total if group > 1 else gathers
    among_all, in_groups = width * _ring(micro * total + wide, ranks), width * _ring(gathers - wide, group)
    far, near = _seconds(config, among_all, ranks), _seconds(config, in_groups, group)
    seconds = None if far is None or near is None else far + near
    return Communication(3, among_all + in_groups, seconds, in_groups, exposed_seconds_per_step=seconds)


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks


def _seconds(config: RunConfig, sent: int, ranks: int) -> float | None:
    """Of so many bytes among neighbouring `ranks`; None where the bandwidth is unknown."""
    link = config.cluster.bandwidth_gb(ranks)
    return sent / (link * 1e9) if link else None


def _seconds_beside(config: RunConfig, micro_batch: float) -> float:
    """How long a micro-batch of so many seconds computes beside gradients that leave: its backward from the end of the
    last layer's to the end of the first layer's. That of the head, by its share of operations, comes before.
    """
    flops, layers = flops_per_token(config), config.model.layers
    in_layers = 1 - flops.by_component["head"] / flops.forward
    return BACKWARD[config.engine.activation_checkpointing] * micro_batch * in_layers * (layers - 1) / layers


def _leaving_early(config: RunConfig) -> float:
    """The share of the gradients that leaves while the backward computes: of all layers but the first. The first layer,
    embedding and head, and the vectors are complete when it ends.
    """
    parts, layers = count_parameters(config).by_component, config.model.layers
    shared = config.engine.expert_parallel
    experts = parts["experts"] // shared
    outside = parts["embedding"] + parts["head"] + parts["norms"]
    held = sum(parts.values()) - parts["experts"] + experts
    return (held - outside) / held * (layers - 1) / layers
