"""Memory of one rank, from the configuration alone: no torch, nothing is built.

Every term is a formula over counts, and follows what DeepSpeed 0.19 keeps in memory: fp32 training keeps a second fp32
copy as masters; ZeRO 1 with fp32 accumulation of bf16 gradients keeps a whole fp32 gradient on every rank; ZeRO 2 keeps
the whole of every gradient that this rank owns a part of. A step peaks when the loss is computed (activations and
logits), when the backward starts (a block that is recomputed), when it ends (gradients and their buckets), or while the
optimiser steps (fp32 copies of one group). Measured peaks: docs/plan.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

from kha_train.config.resolve import decide_plan, planned_device
from kha_train.config.schema import RunConfig
from kha_train.estimate.activations import (
    block_activations,
    folded_bytes,
    kept_block_numbers,
    shared_mask_bytes,
)
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
GAPS = {"cpu": 0.0, "cuda": 0.03}
"""What torch's allocator reserves beyond what it allocates, relative to that: segments that grow are given back only
when memory ends, and a block takes the first gap that is large enough. Measured on the null device: see docs/plan.md.
"""
ALL_REDUCED_ELEMENTS = 500_000_000
"""DeepSpeed's default for the size of a buffer that it all-reduces."""
FROZEN_BYTES = 4
"""A matrix that is not trained is an fp32 buffer, whole on every rank."""
RUNTIME_BYTES = {"cpu": 180_000_000, "cuda": 32 * 1024**2}
"""Memory of DeepSpeed, its process groups and the allocator besides tensors: measured on a CPU. On CUDA the workspace
of cuBLAS on Hopper; what torch's allocator does not know of is part of `cluster.reserved_gib`.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by term, at the peak of a step (`moment`).

    `parameters` in the training dtype (under ZeRO 3 its share, and another with a second sharding within the node), and
    matrices that are not trained ·
    `gathered` whole parameters that ZeRO 3 holds temporarily · `gradients` · `optimizer` fp32 masters and the
    optimiser's states · `buckets` of the gradient reduction · `activations` saved for the backward · `loss` logits of a
    chunk and the fp32 gradient of the head, later that in its own dtype · `step` fp32 copies of one parameter group ·
    `runtime` · `gaps` what torch's CUDA allocator reserves and cannot use.
    """

    moment: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of the terms: what the process reserves of the device."""
        return sum(self.terms.values())

    @property
    def allocated(self) -> int:
        """What tensors take of it."""
        return self.total - self.terms["gaps"]


def uses_bf16(config: RunConfig) -> bool:
    """Whether the training dtype is bf16 on the planned device."""
    return decide_plan(config).precision == "bf16"


def number_bytes(config: RunConfig) -> int:
    """Bytes of a number of a parameter, a gradient or an activation in the training dtype."""
    return 2 if uses_bf16(config) else 4


def micro_batches(config: RunConfig) -> int:
    """Micro-batches per rank in the largest step, at least 1."""
    engine = config.engine
    rows = config.data.batch_sizes.largest * engine.context_parallel // config.cluster.devices
    return max(rows // engine.micro_batch_size, 1)


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a rank in a micro-batch."""
    return config.engine.micro_batch_size * config.model.seq_len // config.engine.context_parallel


def plan_memory(config: RunConfig, rank: int | None = None) -> MemoryPlan:
    """The memory of `rank` of `cluster.devices` at the peak of a step of `config`; by default of the rank that needs
    most.
    """
    engine, ranks = config.engine, config.cluster.devices
    count, width = count_parameters(config), number_bytes(config)
    total, held = count.total, sum(held_parameters(config))
    sharded, second = engine.zero_stage == 3, engine.hpz_partition_size
    states = {
        "parameters": (width * total // ranks if sharded else width * held)
        + (width * total // second if second > 1 else 0)
        + FROZEN_BYTES * count.frozen,
        # The head stays gathered from its forward to its backward, beside what is kept for reuse. One rank alone has
        # nothing to gather.
        "gathered": width * min(total, MAX_LIVE_PARAMETERS + _head(config)) if sharded and ranks > 1 else 0,
        "optimizer": optimizer_bytes(config, engine.moment_dtype) // ranks,
        "runtime": RUNTIME_BYTES[planned_device(config).kind],
    }
    gradients = _gradients(config, total, held, rank)
    one_block = replace(config, engine=replace(engine, activation_checkpointing="full"))
    loss, waiting, last = _loss(config, width), activation_bytes(config), activation_bytes(one_block)
    # Under ZeRO 3 the bucket exists from the start, and its reduction makes a copy.
    buckets, head = _buckets(config, total, width), width * _head(config)
    # The gradient of a tied head waits for that of the embedding, which comes last. ZeRO 1 reduces after the backward.
    late = engine.zero_stage > 1
    end = {
        "activations": min(waiting, last) if late else 0,
        "loss": head if late and config.model.tie_embeddings else 0,
    }
    moments = {
        "the loss is computed": states
        | {"gradients": gradients.before, "buckets": buckets[0], "activations": held_bytes(config), "loss": loss},
        "the backward starts": states
        | {"gradients": gradients.starting, "buckets": buckets[0], "activations": waiting, "loss": head},
        "the backward ends": states | {"gradients": gradients.after, "buckets": buckets[1]} | end,
        "the optimiser steps": states | {"gradients": gradients.stepping, "step": _step(config)},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    gaps = round(GAPS[planned_device(config).kind] * sum(moments[moment].values()))
    if sharded and ranks > 1 and gaps:
        # Weights are gathered on a stream of their own, whose memory no other can take. Its own peak, at another moment
        # of the step, is about a layer higher.
        gaps += width * max(sum(sizes) for times, sizes in _groups(config)[1:] if times)
    return MemoryPlan(moment, moments[moment] | {"gaps": gaps})


def held_bytes(config: RunConfig) -> int:
    """Bytes of the activations of one micro-batch held when the loss is computed: no block is recomputed yet."""
    if config.engine.activation_checkpointing == "none":
        return activation_bytes(config)
    tokens, width = micro_batch_tokens(config), number_bytes(config)
    kept = config.model.layers * config.model.hidden_size
    if config.engine.activation_checkpointing == "selective":
        moe, dense = kept_block_numbers(config, width)
        kept = moe_layers(config) * moe + config.moe.dense_layers * dense
    return tokens * (width * (kept + 3 * config.model.hidden_size) + shared_mask_bytes(config))


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
    width = number_bytes(config)
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


class _Gradients(NamedTuple):
    """Bytes of gradients when the loss of the last micro-batch of a step is computed, when its backward starts, when
    that ends, and while the optimiser steps."""

    before: int
    starting: int
    after: int
    stepping: int


def _gradients(config: RunConfig, total: int, held: int, rank: int | None) -> _Gradients:
    engine, ranks, accumulates = config.engine, config.cluster.devices, micro_batches(config) > 1
    wide = uses_bf16(config) and engine.grad_accum_dtype == "fp32"
    width = number_bytes(config)
    if engine.zero_stage == 3:
        return _Gradients(*((4 if wide else width) * total // ranks,) * 4)
    if engine.zero_stage == 2 and wide:
        sums = 4 * total // ranks
        # Of a gradient larger than the bucket, whoever owns a part keeps the whole until the backward ends, and adds
        # its part by an fp32 copy.
        part = max(min(max(sizes), -(-sum(sizes) // ranks)) for times, sizes in _groups(config) if times)
        kept = width * _touched(config, rank, engine.reduce_bucket_elements) + 4 * part
        before = sums if accumulates else 0
        return _Gradients(before, before, sums + kept, sums)
    if engine.zero_stage == 2:
        # The first gradient allocates a buffer for all that this rank owns a part of. On a CPU its pages exist once
        # they are written.
        owned = width * _touched(config, rank)
        before, buffer = owned if accumulates else 0, owned if planned_device(config).kind == "cuda" else 0
        return _Gradients(before, before + buffer, before + owned, owned)
    # ZeRO 1 reduces after the backward of the last micro-batch. bf16 gradients of a micro-batch stay until the next one
    # begins, and are added to the fp32 ones by an fp32 copy of one matrix after another.
    if wide:
        largest = max(max(sizes) for times, sizes in _groups(config) if times)
        reduced = (4 + width) * _all_reduced(config) if ranks > 1 else 0
        both = (4 + width) * held
        before = both if accumulates else 4 * held
        return _Gradients(before, before, both + max(4 * largest, reduced), both)
    # Those that this rank owns a part of move to a buffer; on a CPU its pages exist once they are written, when those
    # of the gradients are free again.
    moved = width * _touched(config, rank) if planned_device(config).kind == "cuda" else 0
    before = width * held if accumulates else 0
    return _Gradients(before, before, width * held + moved, width * held)


def _all_reduced(config: RunConfig) -> int:
    """Number of elements that DeepSpeed all-reduces at a time under ZeRO 1 with fp32 sums, from a flat fp32 copy that
    it sends in the training dtype: whole parameter groups, one after another, until they exceed `ALL_REDUCED_ELEMENTS`.
    """
    largest = flat = 0
    for times, sizes in _groups(config):
        for _ in range(times):
            flat += sum(sizes)
            largest = max(largest, flat)
            flat = 0 if flat > ALL_REDUCED_ELEMENTS else flat
    return largest


def _touched(config: RunConfig, rank: int | None, above: int = 0) -> int:
    """Number of elements of all matrices with more than `above` that the share of `rank` of its parameter group
    touches; for None the maximum over ranks.

    A group is the matrices of one layer in the order of the module, cut into equal shares; ZeRO 2 keeps a gradient
    whole when the share begins or ends inside it. Experts that ranks share are a group of their own, cut among the
    ranks that hold the same ones: every `expert_parallel`-th rank.
    """
    ranks, spread = config.cluster.devices, config.engine.expert_parallel
    place = None if rank is None else rank // spread
    shared = _most_touched(_shared_groups(config), max(ranks // spread, 1), place, above)
    return _most_touched(_groups(config), ranks, rank, above) + shared


def _most_touched(groups: list[tuple[int, list[int]]], ranks: int, rank: int | None, above: int) -> int:
    # The touched matrices change only at shares that contain a border of a matrix, and their neighbours.
    borders = {int(end * ranks / sum(sizes)) for _, sizes in groups for end in itertools.accumulate(sizes)}
    near = {place + step for place in borders | {0} for step in (-1, 0, 1)} & set(range(ranks))
    asked = near if rank is None else {rank}
    return max(sum(times * _overlap(sizes, place, ranks, above) for times, sizes in groups) for place in asked)


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


def _overlap(sizes: list[int], rank: int, ranks: int, above: int) -> int:
    """The sum of those of the `sizes`, laid end to end, that the share of `rank` touches and that exceed `above`."""
    start, total, touched = 0, sum(sizes), 0
    for size in sizes:
        if size > above and start < (rank + 1) * total / ranks and start + size > rank * total / ranks:
            touched += size
        start += size
    return touched


def _buckets(config: RunConfig, total: int, width: int) -> tuple[int, int]:
    """Buffers of the reduction when the backward starts, and when it ends."""
    bucket = width * min(config.engine.reduce_bucket_elements, total)
    if config.engine.zero_stage < 3:
        return 0, bucket
    return bucket, 2 * bucket + bucket // config.cluster.devices


def _head(config: RunConfig) -> int:
    """Number of elements of the head."""
    return config.model.vocab_size * config.model.hidden_size


def _loss(config: RunConfig, width: int) -> int:
    """The fp32 gradient of the head; and of a chunk its logits and their logarithms in fp32, or later those, their
    gradient in the training dtype and its product with the input, as large as the head.
    """
    model = config.model
    chunk = min(model.loss_chunk_tokens, micro_batch_tokens(config)) * model.vocab_size
    later = (4 + (width if width < 4 else 0)) * chunk + width * _head(config)
    return max(8 * chunk, later) + 4 * _head(config)
