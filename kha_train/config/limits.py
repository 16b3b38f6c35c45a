"""The range of every number of a configuration, and what text may contain: one table, checked before anything else.

A number without an entry has the range of its type: int64, or that of fp32. Upper limits are far beyond practical use.
They keep sizes, products of sizes and times within what torch, NumPy and the operating system can represent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kha_train.errors import ConfigError

INT64 = 2**63 - 1
LARGEST_FP32 = (2 - 2**-23) * 2.0**127
LARGEST_SIZE = 2**20
"""Limit for a width or a number of heads: the product of any three fits an int64."""
LARGEST_INDEX = 2**31 - 1
EXACT_IN_JSON = 2**53
LONGEST_WAIT = 1e9
"""Seconds, 31 years: fits an int64 in nanoseconds."""


class Limit(NamedTuple):
    """The numbers from `low` to `high`, inclusive, except `low` itself with `above`."""

    low: float
    high: float | None = None
    above: bool = False

    def admits(self, number: float) -> bool:
        """Whether `number` is in this range and in that of its type."""
        high = self._high(number)
        return (self.low < number if self.above else self.low <= number) and number <= high

    def words(self, number: float) -> str:
        """The allowed range in words, for an error about `number`."""
        if number > self.low:
            high = self._high(number)
            return f"at most {high:g}" if isinstance(number, float) else f"at most {high:,}"
        return f"above {self.low:g}" if self.above else "0 or more" if self.low == 0 else f"at least {self.low:,}"

    def _high(self, number: float) -> float:
        return self.high if self.high is not None else LARGEST_FP32 if isinstance(number, float) else INT64


POSITIVE, NOT_NEGATIVE, AT_LEAST_ONE = Limit(0.0, above=True), Limit(0), Limit(1)
SIZE, COUNT = Limit(1, LARGEST_SIZE), Limit(0, LARGEST_SIZE)
OF_TYPE = {int: Limit(-INT64 - 1), float: Limit(-LARGEST_FP32)}

LIMITS: dict[str, Limit] = {
    "run.steps": Limit(1, EXACT_IN_JSON),
    "run.seed": NOT_NEGATIVE,
    "run.max_minutes": NOT_NEGATIVE,
    "model.layers": Limit(1, 100_000),
    "model.hidden_size": SIZE,
    "model.query_heads": SIZE,
    "model.kv_heads": SIZE,
    "model.head_dim": SIZE,
    "model.vocab_size": Limit(1, 2**32),
    "model.seq_len": Limit(1, LARGEST_INDEX),
    "model.norm_eps": POSITIVE,
    "model.rope_theta": POSITIVE,
    "model.rope_factor": Limit(1.0),
    "model.rope_original_seq_len": Limit(0, LARGEST_INDEX),
    "model.rope_beta_fast": POSITIVE,
    "model.rope_beta_slow": POSITIVE,
    "model.rope_attention_factor": POSITIVE,
    # Below it, fp32 gives no gradient in the first step somewhere.
    "model.init_std": Limit(1e-6),
    "model.loss_chunk_tokens": AT_LEAST_ONE,
    "attention.base.*": Limit(0, LARGEST_SIZE),
    "attention.base.chunk_tokens": SIZE,
    "attention.interaction.component_heads": COUNT,
    "attention.interaction.component_heads_by_layer": COUNT,
    # A matrix of zeros would silence its heads.
    "attention.interaction.init.scale": POSITIVE,
    "moe.experts": Limit(0, 65_536),
    "moe.top_k": Limit(0, 65_536),
    "moe.expert_width": COUNT,
    "moe.shared_experts": Limit(0, 65_536),
    "moe.dense_layers": NOT_NEGATIVE,
    "moe.dense_width": COUNT,
    "moe.expert_groups": AT_LEAST_ONE,
    "moe.top_groups": AT_LEAST_ONE,
    "moe.bias_update_rate": NOT_NEGATIVE,
    "moe.auxiliary_loss.weight": NOT_NEGATIVE,
    "moe.z_loss_weight": NOT_NEGATIVE,
    "moe.routing_warmup_steps": NOT_NEGATIVE,
    "moe.routing_seed": NOT_NEGATIVE,
    "data.seed": NOT_NEGATIVE,
    "data.global_batch_size": Limit(1, LARGEST_INDEX),
    # The first step has `data.global_batch_size` rows.
    "data.batch_schedule.start_step": Limit(2, EXACT_IN_JSON),
    "data.batch_schedule.global_batch_size": Limit(1, LARGEST_INDEX),
    "data.prefetch": Limit(0, 10_000),
    "data.cache_gib": POSITIVE,
    "data.phases.start_sample": NOT_NEGATIVE,
    "data.skip_windows": NOT_NEGATIVE,
    "optim.lr": POSITIVE,
    "optim.eps": POSITIVE,
    "optim.iterations": Limit(1, 100),
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.interaction_lr_scale": NOT_NEGATIVE,
    "optim.grad_clip": POSITIVE,
    "optim.schedule.surge.factor": POSITIVE,
    "optim.schedule.surge.start": Limit(0.0, 1.0),
    "optim.schedule.surge.length": Limit(0.0, 1.0),
    "engine.micro_batch_size": Limit(1, LARGEST_INDEX),
    "engine.reduce_bucket_elements": AT_LEAST_ONE,
    "engine.hpz_partition_size": AT_LEAST_ONE,
    "engine.expert_parallel": AT_LEAST_ONE,
    "engine.context_parallel": AT_LEAST_ONE,
    "engine.collective_timeout_seconds": Limit(0.0, LONGEST_WAIT, above=True),
    "engine.hang_timeout_seconds": Limit(0.0, LONGEST_WAIT, above=True),
    "engine.audit_every": NOT_NEGATIVE,
    "checkpoint.every_steps": AT_LEAST_ONE,
    "checkpoint.every_minutes": NOT_NEGATIVE,
    "checkpoint.keep_last": AT_LEAST_ONE,
    "checkpoint.keep_every_steps": NOT_NEGATIVE,
    "checkpoint.max_failures": AT_LEAST_ONE,
    "checkpoint.ring_steps": NOT_NEGATIVE,
    "validation.every_steps": NOT_NEGATIVE,
    "validation.rows": NOT_NEGATIVE,
    "evaluation.tasks.*": NOT_NEGATIVE,
    "stability.max_nonfinite_steps": AT_LEAST_ONE,
    "stability.max_skips": AT_LEAST_ONE,
    "stability.rewind.after": AT_LEAST_ONE,
    "stability.rewind.margin": NOT_NEGATIVE,
    "stability.rewind.window": AT_LEAST_ONE,
    "stability.rewind.at_most": NOT_NEGATIVE,
    "stability.probe_every": NOT_NEGATIVE,
    "telemetry.peak_tflops": NOT_NEGATIVE,
    "telemetry.layer_statistics_every": NOT_NEGATIVE,
    "profile.first_step": NOT_NEGATIVE,
    "profile.last_step": NOT_NEGATIVE,
    "cluster.devices": Limit(1, 1_000_000),
    "cluster.devices_per_node": Limit(1, 1_000_000),
    "cluster.*": NOT_NEGATIVE,
}
"""By key; `*` stands for all others of a section, and elements of a list have the key of the list."""


def check_limits(values: Mapping[str, Any], *, upper: bool = True) -> None:
    """Check a configuration, given as nested plain `values`. Raises ConfigError for the first number outside its range,
    and for text that no file or program accepts. Without `upper` no number is too large: a run of an earlier release
    was trained with it.
    """
    for path, value in _leaves(values):
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(path, value, upper)


def limit_of(path: str, kind: type) -> Limit:
    """The range of the number at `path`, of the type `kind`."""
    key = "".join(part.partition("]")[2] if i else part for i, part in enumerate(path.split("[")))
    return LIMITS.get(key) or LIMITS.get(f"{key.rpartition('.')[0]}.*") or OF_TYPE[kind]


def _check_number(path: str, number: float, upper: bool) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise ConfigError("must be a finite number", field=path, value=number)
    limit = limit_of(path, type(number))
    if not limit.admits(number) and (upper or number <= limit.low):
        raise ConfigError("out of range", field=path, value=number, allowed=limit.words(number))


def _check_text(path: str, text: str) -> None:
    if "\0" in text:
        raise ConfigError("holds a NUL character", field=path, value=text, fix="leave it out")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that is neither a section nor a list; elements of lists are numbered."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    else:
        yield path, value
