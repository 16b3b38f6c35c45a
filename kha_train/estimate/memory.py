"""Memory of one rank, from the configuration alone: no torch, nothing is built.

Every term is a formula over counts, and follows what DeepSpeed 0.19 keeps in memory: fp32 training keeps a second fp32
copy as masters; ZeRO 1 with fp32 accumulation of bf16 gradients keeps a whole fp32 gradient on every rank; ZeRO 2 keeps
the whole of every gradient that this rank owns a part of. A step peaks when the backward starts (activations and loss),
when it ends (gradients and their buckets), or while the optimiser steps (fp32 copies of one group). Measured peaks:
docs/plan.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from kha_train.config.resolve import decide_plan, planned_device
from kha_train.config.schema import RunConfig
from kha_train.estimate.activations import attention_activations, folded_bytes, kept_block_numbers, shared_mask_bytes
from kha_train.estimate.counts import (
    attention_parameters,
    count_parameters,
    held_parameters,
    map_parameters,
    moe_layers,
)
from kha_train.variants.optimizer import MASTER_BYTES, OptimSection

GIB = 1024**3
MAX_LIVE_PARAMETERS = 1_000_000_000
"""ZeRO 3 keeps this many gathered parameters by DeepSpeed's default."""
FROZEN_BYTES = 4
"""A matrix that is not trained is an fp32 buffer, whole on every rank."""
RUNTIME_BYTES = {"cpu": 180_000_000, "cuda": 0}
"""Memory of DeepSpeed, its process groups and the allocator besides tensors: measured on a CPU; on CUDA it is part of
`cluster.reserved_gib`.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by term, at the peak of a step (`moment`).

    `parameters` in the training dtype (under ZeRO 3 its share, and another with a second sharding within the node), and
    matrices that are not trained ·
    `gathered` whole parameters that ZeRO 3 holds temporarily · `gradients` · `optimizer` fp32 masters and the
    optimiser's states · `buckets` of the gradient reduction · `activations` saved for the backward · `loss` logits of a
    chunk and the fp32 gradient of the head · `step` fp32 copies of one parameter group · `runtime`.
    """

    moment: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())


def uses_bf16(config: RunConfig) -> bool:
    """Whether the training dtype is bf16 on the planned device."""
    return decide_plan(config).precision == "bf16"


def micro_batches(config: RunConfig) -> int:
    """Micro-batches per rank and step, at least 1."""
    engine = config.engine
    rows = config.data.global_batch_size * engine.context_parallel // config.cluster.devices
    return max(rows // engine.micro_batch_size, 1)


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a rank in a micro-batch."""
    return config.engine.micro_batch_size * config.model.seq_len // config.engine.context_parallel


def plan_memory(config: RunConfig) -> MemoryPlan:
    """The memory of one of `cluster.devices` ranks at the peak of a step of `config`."""
    engine, ranks = config.engine, config.cluster.devices
    count, width = count_parameters(config), 2 if uses_bf16(config) else 4
    total, held = count.total, sum(held_parameters(config))
    sharded, second = engine.zero_stage == 3, engine.hpz_partition_size
    states = {
        "parameters": (width * total // ranks if sharded else width * held)
        + (width * total // second if second > 1 else 0)
        + FROZEN_BYTES * count.frozen,
        "gathered": width * min(total, MAX_LIVE_PARAMETERS) if sharded else 0,
        "optimizer": optimizer_bytes(config, engine.moment_dtype) // ranks,
        "runtime": RUNTIME_BYTES[planned_device(config).kind],
    }
    before, after = _gradients(config, total, held)
    one_block = replace(config, engine=replace(engine, activation_checkpointing="full"))
    loss, waiting, last = _loss(config, width), activation_bytes(config), activation_bytes(one_block)
    # Under ZeRO 3 the bucket exists from the start, and its reduction makes a copy.
    buckets = _buckets(config, total, width)
    start = {"gradients": before, "buckets": buckets[0], "activations": waiting, "loss": loss}
    end = {"gradients": after, "buckets": buckets[1], "activations": min(waiting, last), "loss": 0}
    moments = (
        MemoryPlan("the backward starts", states | start),
        MemoryPlan("the backward ends", states | end),
        MemoryPlan("the optimiser steps", states | {"gradients": after, "step": _step(config)}),
    )
    return max(moments, key=lambda moment: moment.total)


def optimizer_bytes(config: RunConfig, moment_dtype: str = "fp32") -> int:
    """Bytes of the masters and optimiser states of all ranks together."""
    optim, total, maps = config.optim, count_parameters(config).total, map_parameters(config)
    return optim.bytes_per_parameter(moment_dtype) * (total - maps) + maps * optim.bytes_per_parameter(
        moment_dtype, is_map=True
    )


def activation_bytes(config: RunConfig) -> int:
    """Bytes of the activations of one micro-batch held when the backward starts.

    Without recomputation: everything that every block saves. With it: the input of every block (`selective`: also the
    results it keeps), and one whole block.
    """
    tokens = micro_batch_tokens(config)
    width = 2 if uses_bf16(config) else 4
    moe, dense = block_activations(config)
    # The residual stream enters and leaves; the final norm saves its input and passes another tensor to the head.
    outside = 3 * config.model.hidden_size
    if config.engine.activation_checkpointing == "none":
        layers, held = moe_layers(config) * moe + config.moe.dense_layers * dense, config.model.layers
    elif config.engine.activation_checkpointing == "selective":
        kept_moe, kept_dense = kept_block_numbers(config, width)
        kept = moe_layers(config) * kept_moe + config.moe.dense_layers * kept_dense
        # What the recomputed block keeps is already counted.
        layers, held = kept + max(moe - kept_moe, dense - kept_dense, 0), 1
    else:
        layers, held = config.model.layers * config.model.hidden_size + max(moe, dense), 1
    per_token = width * (layers + outside) + shared_mask_bytes(config)
    return tokens * per_token + held * folded_bytes(config, width)


def block_activations(config: RunConfig) -> tuple[int, int]:
    """Numbers per token that a block saves for its backward: a block with experts (0 if there is none), and a dense
    one.

    Attention: its input before and after the norm, and what `activations.py` counts. Experts: their input before and
    after the norm; for each of top_k gate and up, which is all that the grouped backend keeps. The other backends, and
    shared experts, also keep the copied input and 3 more tensors of the expert's width (silu of gate, its product with
    up, and that times the weight). Where ranks share the experts, the rows that arrived stay too: as many as were sent,
    when loads are balanced.
    """
    model, moe = config.model, config.moe
    attention = 2 * model.hidden_size + attention_activations(config, 2 if uses_bf16(config) else 4)
    shared = 5 * moe.shared_experts * moe.expert_width
    copy = 2 * moe.expert_width if moe.backend == "grouped" else model.hidden_size + 5 * moe.expert_width
    arrived = model.hidden_size if config.engine.expert_parallel > 1 else 0
    routed = moe.top_k * (copy + arrived) + 2 * moe.experts
    experts = attention + 2 * model.hidden_size + routed + shared
    dense = attention + 2 * model.hidden_size + 5 * moe.dense_width
    return (experts if moe_layers(config) else 0), (dense if moe.dense_layers else 0)


@dataclass(frozen=True)
class Recipe:
    """A way to store model states: bytes per parameter for parameters, gradients and optimiser. `offered` by this
    engine or not (then it is listed for comparison, and would need another engine).
    """

    name: str
    parameters: int
    gradients: int
    optimizer: float
    offered: bool

    @property
    def bytes_per_parameter(self) -> float:
        """Their sum, on one rank; where kinds of parameters differ, the mean."""
        return self.parameters + self.gradients + self.optimizer

    def states(self, total: int, stage: int, ranks: int, held: int | None = None) -> int:
        """Bytes of `total` parameters on one of `ranks`, each part sharded according to the ZeRO stage or whole. Whole
        are the `held` ones (default: all), because ranks may share the experts.
        """
        held = total if held is None else held
        parts = (self.parameters, 3), (self.gradients, 2), (self.optimizer, 1)
        return sum(int(size * total // ranks if stage >= first else size * held) for size, first in parts)


def recipes(optim: OptimSection, maps: float = 0.0) -> tuple[Recipe, ...]:
    """The recipes with the optimiser of `optim`: with AdamW from 20 bytes per parameter downwards. `maps` is the share
    of the parameters that are linear maps. docs/plan.md lists what else DeepSpeed offers.
    """

    def mean(moment_dtype: str) -> float:
        other, own = (optim.bytes_per_parameter(moment_dtype, is_map) for is_map in (False, True))
        return other if own == other else other + (own - other) * maps

    wide, narrow = mean("fp32"), mean("bf16")
    return (
        Recipe("fp32: parameters, gradients, masters, moments", 4, 4, wide, True),
        Recipe("bf16, gradients accumulated in fp32", 2, 6, wide, True),
        Recipe("bf16, gradients in bf16", 2, 2, wide, True),
        Recipe("bf16 with bf16 moments", 2, 2, narrow, True),
        Recipe("bf16 throughout, no masters", 2, 2, narrow - MASTER_BYTES, False),
        Recipe("bf16, optimiser offloaded to the host", 2, 2, 0, False),
    )


def largest_micro_batch(config: RunConfig, budget: float) -> int:
    """The largest micro-batch with which a rank stays within `budget` bytes; 0 when even one row does not fit."""

    def fits(rows: int) -> bool:
        engine = replace(config.engine, micro_batch_size=rows)
        return plan_memory(replace(config, engine=engine)).total <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _gradients(config: RunConfig, total: int, held: int) -> tuple[int, int]:
    """Gradients of `total` parameters, of which a rank holds `held`, when the last backward of a step starts, and when
    it ends.
    """
    engine, ranks, accumulates = config.engine, config.cluster.devices, micro_batches(config) > 1
    wide = uses_bf16(config) and engine.grad_accum_dtype == "fp32"
    width = 2 if uses_bf16(config) else 4
    if engine.zero_stage == 3:
        return ((4 if wide else width) * total // ranks,) * 2
    if engine.zero_stage == 2 and wide:
        return 4 * total // ranks if accumulates else 0, 4 * total // ranks
    if engine.zero_stage == 2:
        touched = width * _touched(config)
        return touched if accumulates else 0, touched * (2 if accumulates else 1)
    # ZeRO 1; with fp32 accumulation the whole fp32 gradient is kept, and the bf16 one is added to it at the end.
    return (4 * held, 6 * held) if wide else (width * held if accumulates else 0, width * held)


def _touched(config: RunConfig) -> int:
    """Number of elements of all matrices that a rank's share of its parameter group touches: the maximum over ranks.

    A group is the matrices of one layer in the order of the module, cut into equal shares; ZeRO 2 keeps a gradient
    whole when the share begins or ends inside it. Experts that ranks share are a group of their own, cut among the
    ranks that hold the same ones.
    """
    ranks = config.cluster.devices
    shared = _most_touched(_shared_groups(config), max(ranks // config.engine.expert_parallel, 1))
    return _most_touched(_groups(config), ranks) + shared


def _most_touched(groups: list[tuple[int, list[int]]], ranks: int) -> int:
    # The touched matrices change only at shares that contain a border of a matrix, and their neighbours.
    borders = {int(end * ranks / sum(sizes)) for _, sizes in groups for end in itertools.accumulate(sizes)}
    near = {rank + step for rank in borders | {0} for step in (-1, 0, 1)} & set(range(ranks))
    return max(sum(times * _overlap(sizes, rank, ranks) for times, sizes in groups) for rank in near)


def _groups(config: RunConfig) -> list[tuple[int, list[int]]]:
    """The parameter groups of matrices: the number of groups of each kind, and the sizes of their matrices, with the
    attention of the largest layer. Without the experts that ranks share.
    """
    model, moe = config.model, config.moe
    attention = max(attention_parameters(config))
    expert, vocabulary = model.hidden_size * moe.expert_width, model.vocab_size * model.hidden_size
    routed = [2 * moe.experts * expert, moe.experts * expert] if config.engine.expert_parallel == 1 else []
    return [
        (1, [vocabulary] if model.tie_embeddings else [vocabulary, vocabulary]),
        (
            moe_layers(config),
            [
                *[attention // 4] * 4,
                moe.experts * model.hidden_size,
                *routed,
                2 * moe.shared_experts * expert,
                moe.shared_experts * expert,
            ],
        ),
        (
            moe.dense_layers,
            [*[attention // 4] * 4, 2 * model.hidden_size * moe.dense_width, model.hidden_size * moe.dense_width],
        ),
    ]


def _shared_groups(config: RunConfig) -> list[tuple[int, list[int]]]:
    """As `_groups`, of the experts that ranks share: those of one rank. Empty if every rank holds all of them."""
    moe, shared = config.moe, config.engine.expert_parallel
    one = moe.experts // shared * config.model.hidden_size * moe.expert_width
    return [(moe_layers(config), [2 * one, one])] if shared > 1 else []


def _step(config: RunConfig) -> int:
    """What the optimiser holds while it steps one group after another: its gradients in fp32, its moments, widened if
    they are stored in bf16, for statistics of layers a copy of its masters, and what the step itself allocates.
    """
    optim, ranks = config.optim, config.cluster.devices
    copied = MASTER_BYTES if config.telemetry.layer_statistics_every else 0
    # Groups of layers come after the one of embedding and head.
    groups = [(sum(sizes), number > 0) for number, (times, sizes) in enumerate(_groups(config)) if times]
    # A rank's part of the experts is cut among as many fewer ranks as there are parts.
    groups += [(config.engine.expert_parallel * sum(sizes), True) for _, sizes in _shared_groups(config)]
    return max(
        (4 + optim.widened_bytes(config.engine.moment_dtype, is_layer) + copied) * size // ranks
        + (optim.step_bytes(size // ranks) if is_layer else 0)
        for size, is_layer in groups
    )


def _overlap(sizes: list[int], rank: int, ranks: int) -> int:
    """The sum of those of the `sizes`, laid end to end, that the share of `rank` touches."""
    start, total, touched = 0, sum(sizes), 0
    for size in sizes:
        if start < (rank + 1) * total / ranks and start + size > rank * total / ranks:
            touched += size
        start += size
    return touched


def _buckets(config: RunConfig, total: int, width: int) -> tuple[int, int]:
    """Buffers of the reduction when the backward starts, and when it ends."""
    bucket = width * min(config.engine.reduce_bucket_elements, total)
    if config.engine.zero_stage < 3:
        return 0, bucket
    return bucket, 2 * bucket + bucket // config.cluster.devices


def _loss(config: RunConfig, width: int) -> int:
    """Logits of a chunk and their gradient in fp32; the fp32 gradient of the head, and once more in its own dtype."""
    model = config.model
    chunk = min(model.loss_chunk_tokens, micro_batch_tokens(config))
    return 2 * 4 * chunk * model.vocab_size + (4 + width) * model.vocab_size * model.hidden_size
