"""Memory of one rank, from the configuration alone: no torch, nothing is built.

Every term is a formula over counts, and follows what DeepSpeed 0.19 and the reduction of gradients keep in memory: fp32
training keeps a second fp32 copy as masters; ZeRO 1 keeps the whole sum of a step's gradients on every rank, ZeRO 2 its
share. A step peaks when the loss is computed (activations and logits), when the backward starts (a block that is
recomputed), when the first gradients leave, when it ends (all that arrived), or while the optimiser steps (fp32 copies
of one group). Measured peaks: docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from kha_train.config.constants import GROUPS_IN_FLIGHT
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
    optimiser's states · `buckets` of gradients that are on their way · `activations` saved for the backward · `loss`
    logits of a chunk and the fp32 gradient of the head, later that in its own dtype · `step` fp32 copies of one
    parameter group · `runtime` · `gaps` what torch's CUDA allocator reserves and cannot use.
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


def plan_memory(config: RunConfig) -> MemoryPlan:
    """The memory of each of `cluster.devices` at the peak of a step of `config`."""
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
    found = _sharded_gradients(config, total, width) if sharded else _gradients(config, total, held, width)
    one_block = replace(config, engine=replace(engine, activation_checkpointing="full"))
    loss, waiting, last = _loss(config, width), activation_bytes(config), activation_bytes(one_block)
    head, tied = width * _head(config), config.model.tie_embeddings
    # The gradient of a tied head waits for that of the embedding, which comes last.
    end = {"activations": min(waiting, last), "loss": head if tied else 0}
    moments = {
        "the loss is computed": found.before | {"activations": held_bytes(config), "loss": loss},
        "the backward starts": found.before | {"activations": waiting, "loss": head},
        "gradients leave": found.leaving
        | {"activations": _left_activations(config, waiting), "loss": head if tied else 0},
        "the backward ends": found.after | end,
        "the optimiser steps": found.stepping | {"step": _step(config)},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    terms = states | moments[moment]
    gaps = round(GAPS[planned_device(config).kind] * sum(terms.values()))
    if sharded and ranks > 1 and gaps:
        # Weights are gathered on a stream of their own, whose memory no other can take. Its own peak, at another moment
        # of the step, is about a layer higher.
        gaps += width * max(sum(sizes) for times, sizes in _groups(config)[1:] if times)
    return MemoryPlan(moment, terms | {"gaps": gaps})


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
        Recipe("bf16, gradients accumulated in fp32", 2, 4, wide, True),
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
    """Bytes of `gradients`, and of `buckets` on their way, at moments of a step's last backward, and while it steps."""

    before: dict[str, int]
    leaving: dict[str, int]
    after: dict[str, int]
    stepping: dict[str, int]


def _gradients(config: RunConfig, total: int, held: int, width: int) -> _Gradients:
    """Under ZeRO 1 and 2. A parameter group is a buffer, which fills while two others are on their way, beside the
    gradient that the backward has just computed. Embedding and head are one group, which leaves last. What arrives has
    the size of a share, or on a CPU, where the parts of all ranks are added on arrival, that of the group.
    """
    ranks, accumulates = config.cluster.devices, micro_batches(config) > 1
    wide = _sum_width(config, width)
    groups = [(sizes, number == 0) for number, (times, sizes) in enumerate(_groups(config)) if times]
    groups += [(sizes, False) for _, sizes in _shared_groups(config)]
    outside = sum(sum(sizes) for sizes, is_outside in groups if is_outside)
    layer = max(sum(sizes) for sizes, is_outside in groups if not is_outside)
    computed = width * max(max(sizes) for sizes, is_outside in groups if not is_outside)
    arriving = width * (layer // ranks if planned_device(config).kind == "cuda" else layer)
    flights = min(config.model.layers - 1, GROUPS_IN_FLIGHT) if ranks > 1 else 0
    flying = flights * (width * layer + arriving)
    share = wide * total // ranks
    if config.engine.zero_stage == 1 and accumulates:
        # The sums of the first groups are free when they have arrived, or once they are rounded to what is sent.
        first = flights * (wide * layer // ranks + arriving)
        if wide > width and flights:
            first = wide * layer // ranks + width * layer + arriving
        return _Gradients(
            {"gradients": wide * held, "buckets": 0},
            {"gradients": wide * held, "buckets": computed + first},
            {"gradients": share, "buckets": wide * outside + flying + computed},
            {"gradients": share, "buckets": 0},
        )
    before = share if accumulates else 0
    # Of an untied head and embedding, the buffer exists from the start of the backward.
    early = 0 if config.model.tie_embeddings else width * outside
    return _Gradients(
        {"gradients": before, "buckets": 0},
        {"gradients": before, "buckets": early + width * layer + computed + flying},
        {"gradients": share, "buckets": width * (outside + layer) + computed + flying},
        {"gradients": share, "buckets": 0},
    )


def _sharded_gradients(config: RunConfig, total: int, width: int) -> _Gradients:
    """Under ZeRO 3. The bucket exists from the start, and its reduction makes a copy."""
    ranks, bucket = config.cluster.devices, width * min(config.engine.reduce_bucket_elements, total)
    share = _sum_width(config, width) * total // ranks
    before, after = ({"gradients": share, "buckets": size} for size in (bucket, 2 * bucket + bucket // ranks))
    return _Gradients(before, before, after, {"gradients": share, "buckets": 0})


def _sum_width(config: RunConfig, width: int) -> int:
    """Bytes of a number of a gradient that accumulates."""
    return 4 if config.engine.grad_accum_dtype == "fp32" else width


def _left_activations(config: RunConfig, waiting: int) -> int:
    """Of those `waiting` when the backward starts, what is left when two layers are done and a third is computed."""
    layers = config.model.layers
    return waiting - held_bytes(config) * min(layers - 1, GROUPS_IN_FLIGHT) // layers


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
    # The sums themselves, where they are fp32 in one tensor.
    gradient = 0 if config.engine.zero_stage < 3 and _sum_width(config, number_bytes(config)) == 4 else 4
    # Groups of layers come after the one of embedding and head.
    groups = [(sum(sizes), number > 0) for number, (times, sizes) in enumerate(_groups(config)) if times]
    # A rank's part of the experts is cut among as many fewer ranks as there are parts.
    groups += [(config.engine.expert_parallel * sum(sizes), True) for _, sizes in _shared_groups(config)]
    return max(
        (gradient + optim.widened_bytes(config.engine.moment_dtype, is_layer) + copied) * size // ranks
        + (optim.step_bytes(size // ranks) if is_layer else 0)
        for size, is_layer in groups
    )


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
