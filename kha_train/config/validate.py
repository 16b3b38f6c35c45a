"""Finds combinations that cannot run before anything is built. Each error says what to change."""

from __future__ import annotations

import math
import os
import shlex
from itertools import pairwise

from kha_train.config.build import nearest, to_plain
from kha_train.config.constants import ALIGNED_NUMBERS
from kha_train.config.limits import check_limits
from kha_train.config.schema import RunConfig
from kha_train.config.urls import refuse_credentials_in
from kha_train.config.validate_attention import check_attention
from kha_train.config.validate_ranks import divisors_of
from kha_train.errors import ConfigError, Settings, either
from kha_train.variants.registry import engines
from kha_train.variants.task import invalid_tasks

MOST_PROFILED_STEPS = 50
LEAST_FP32 = 2.0**-126
"""The smallest normal number of fp32: smaller numbers count as 0 in a model."""


def validate(config: RunConfig, *, to_train: bool = True) -> None:
    """Every check that needs only the configuration. Without `to_train`, only what is needed to read a run that was
    trained with it, maybe by a release that refused less. Raises ConfigError.
    """
    values = to_plain(config)
    refuse_credentials_in(values)
    check_limits(values, upper=to_train)
    _run_dir(config)
    _shares(config)
    check_attention(config)
    _layers(config)
    _experts(config)
    if to_train:
        _telemetry(config)
        _branch(config)
        _router_learns(config)
    _engine(config)
    _data(config)
    _evaluation(config)
    _profile(config)


def _run_dir(config: RunConfig) -> None:
    if not config.run.dir.strip():
        raise ConfigError(
            "names no directory", field="run.dir", value=config.run.dir, fix=Settings("run.dir=runs/NAME")
        )
    if config.run.dir.startswith("-"):
        # Every command given this directory would read it as an option.
        fix = Settings(shlex.quote(f"run.dir=./{config.run.dir}"))
        raise ConfigError("starts with a dash, like an option", field="run.dir", value=config.run.dir, fix=fix)


def _branch(config: RunConfig) -> None:
    """A branch begins with all that another run is, and is kept elsewhere."""
    run = config.run
    if run.branch_from and run.init_from:
        raise ConfigError(
            f"a run that begins with the whole state of another takes no weights of a third ({run.init_from})",
            field="run.branch_from",
            value=run.branch_from,
            allowed="run.branch_from (the whole state) or run.init_from (weights alone)",
            fix=either(Settings("run.init_from=''"), Settings("run.branch_from=''")),
        )
    if not run.branch_from:
        return
    own, parent = os.path.realpath(run.dir), os.path.realpath(run.branch_from)
    if own == parent or own in (os.path.dirname(parent), os.path.dirname(os.path.dirname(parent))):
        place = shlex.quote(f"run.dir={run.dir.rstrip('/')}-branch")
        raise ConfigError(
            "a branch is a run of its own, and this is the directory of its parent",
            field="run.dir",
            value=run.dir,
            allowed="another directory",
            fix=Settings(place),
        )


def _telemetry(config: RunConfig) -> None:
    if problem := config.telemetry.invalid():
        raise problem


def _shares(config: RunConfig) -> None:
    schedule = config.optim.schedule
    for field, value in {"warmup": schedule.warmup, "decay": schedule.decay, "final": schedule.final}.items():
        if not 0 <= value <= 1:
            raise ConfigError("must be a share", field=f"optim.schedule.{field}", value=value, allowed="0 to 1")
    if schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        left = 1 - schedule.warmup
        # The nearest number with six digits whose sum does not exceed the run.
        decay = next(share for share in (round(left, 6), round(left - 1e-6, 6)) if schedule.warmup + share <= 1)
        raise ConfigError(
            f"warm-up ({schedule.warmup}) and decay ({schedule.decay}) together exceed the run",
            field="optim.schedule",
            fix=Settings(f"optim.schedule.decay={decay}"),
        )
    if problem := config.optim.invalid():
        raise problem


def _layers(config: RunConfig) -> None:
    """Dense layers need a width, the others need experts."""
    model, moe = config.model, config.moe
    if moe.dense_layers > model.layers:
        raise ConfigError(f"only {model.layers} layers", field="moe.dense_layers", value=moe.dense_layers)
    if moe.dense_layers and moe.dense_width < 1:
        raise ConfigError(
            f"{moe.dense_layers} layers are dense", field="moe.dense_width", value=moe.dense_width, allowed="1 or more"
        )
    wanted = {"moe.experts": moe.experts, "moe.top_k": moe.top_k, "moe.expert_width": moe.expert_width}
    for field, value in wanted.items():
        if moe.dense_layers < model.layers and value < 1:
            raise ConfigError(
                f"{model.layers - moe.dense_layers} of {model.layers} layers have experts",
                field=field,
                value=value,
                allowed="1 or more",
                fix=either("raise it", Settings(_all_dense(config))),
            )
        if moe.dense_layers == model.layers and value:
            raise ConfigError(
                "every layer is dense", field=field, value=value, allowed="0", fix=Settings(_all_dense(config))
            )
    if moe.dense_layers == model.layers and moe.shared_experts:
        raise ConfigError(
            "every layer is dense",
            field="moe.shared_experts",
            value=moe.shared_experts,
            allowed="0",
            fix=Settings(_all_dense(config)),
        )


def _all_dense(config: RunConfig) -> str:
    """The overrides of a model without experts; its dense layers keep their width if they have one."""
    width = max(config.moe.dense_width, 0) or 4 * config.model.hidden_size
    none = " ".join(f"moe.{name}=0" for name in ("experts", "top_k", "expert_width", "shared_experts"))
    return f"moe.dense_layers={config.model.layers} moe.dense_width={width} {none}"


def _experts(config: RunConfig) -> None:
    moe = config.moe
    if moe.top_k > moe.experts:
        raise ConfigError(f"only {moe.experts} experts", field="moe.top_k", value=moe.top_k, fix="lower it")
    _groups(config)
    if problem := misaligned(config):
        raise problem


def misaligned(config: RunConfig) -> ConfigError | None:
    """Why the grouped backend cannot read rows of these widths, or None: in bf16 they must be multiples of 16 bytes."""
    widths = {"model.hidden_size": config.model.hidden_size, "moe.expert_width": config.moe.expert_width}
    for field, width in widths.items():
        if config.moe.backend == "grouped" and width % ALIGNED_NUMBERS:
            below = width // ALIGNED_NUMBERS * ALIGNED_NUMBERS
            near = f"{below or ALIGNED_NUMBERS} or {below + ALIGNED_NUMBERS}"
            return ConfigError(
                "the grouped expert backend needs rows of a multiple of 16 bytes",
                field=field,
                value=width,
                allowed=f"multiples of {ALIGNED_NUMBERS}, such as {near}",
                fix=Settings("moe.backend=loop"),
            )
    return None


def _groups(config: RunConfig) -> None:
    """Groups must have equal size, and the allowed ones enough experts."""
    moe = config.moe
    if moe.experts and moe.experts % moe.expert_groups:
        raise ConfigError(
            f"does not divide {moe.experts} experts",
            field="moe.expert_groups",
            value=moe.expert_groups,
            allowed=divisors_of(moe.experts),
        )
    if moe.top_groups > moe.expert_groups:
        raise ConfigError(f"only {moe.expert_groups} groups", field="moe.top_groups", value=moe.top_groups)
    in_reach = moe.experts // moe.expert_groups * moe.top_groups
    if moe.top_k > in_reach:
        raise ConfigError(
            f"only {in_reach} experts in {moe.top_groups} of {moe.expert_groups} groups",
            field="moe.top_k",
            value=moe.top_k,
            fix="raise moe.top_groups or lower it",
        )


def _router_learns(config: RunConfig) -> None:
    """The language model's loss must reach the router through its weights w: where dw/ds is 0 it never learns to
    choose. An auxiliary or z-loss is no substitute, because it depends on loads and logits but not on the text. One
    expert needs no choice.
    """
    moe = config.moe
    if moe.experts < 2:
        return
    if moe.top_k == 1 and moe.renormalize:
        several = moe.experts // moe.expert_groups * moe.top_groups > 1
        raise ConfigError(
            "one chosen score over itself is always 1, so the router gets no gradient and never learns",
            field="moe.renormalize",
            value=True,
            allowed="false with moe.top_k=1; true with more",
            fix=either(Settings("moe.renormalize=false"), *([Settings("moe.top_k=2")] if several else [])),
        )
    if abs(moe.routed_scaling) < LEAST_FP32:
        raise ConfigError(
            "routed experts times 0 add nothing, so neither they nor the router get a gradient",
            field="moe.routed_scaling",
            value=moe.routed_scaling,
            allowed="any number but 0",
            fix=Settings("moe.routed_scaling=1.0"),
        )


def _engine(config: RunConfig) -> None:
    engine = config.engine
    if engine.name not in engines():
        raise ConfigError("no such engine", field="engine.name", value=engine.name, **nearest(engine.name, engines()))
    if engine.grad_accum_dtype == "bf16" and engine.precision == "fp32":
        raise ConfigError(
            "fp32 training accumulates in fp32",
            field="engine.grad_accum_dtype",
            value="bf16",
            fix=either(Settings("engine.grad_accum_dtype=fp32"), Settings("engine.precision=bf16")),
        )
    if engine.moment_dtype == "bf16" and (problem := config.optim.refuses_bf16()):
        raise problem
    if engine.compile == "block" and engine.zero_stage == 3:
        raise ConfigError(
            "a compiled block does not see ZeRO 3 gather its weights",
            field="engine.compile",
            value=engine.compile,
            fix=either(Settings("engine.compile=none"), Settings("engine.zero_stage=2 engine.hpz_partition_size=1")),
        )
    if engine.compile == "block" and engine.activation_checkpointing == "selective":
        raise ConfigError(
            "a compiled block decides by itself what it keeps",
            field="engine.activation_checkpointing",
            value="selective",
            allowed="none, full",
            fix=either(Settings("engine.activation_checkpointing=none"), Settings("engine.compile=none")),
        )
    if engine.hpz_partition_size > 1 and engine.zero_stage != 3:
        raise ConfigError(
            "only ZeRO 3 partitions weights",
            field="engine.hpz_partition_size",
            value=engine.hpz_partition_size,
            fix=either(Settings("engine.hpz_partition_size=1"), Settings("engine.zero_stage=3 engine.compile=none")),
        )
    if engine.expert_parallel > 1 and (problem := _cannot_spread(config)):
        raise problem


def _cannot_spread(config: RunConfig) -> ConfigError | None:
    """Why ranks cannot share the experts, or None."""
    engine, experts, field = config.engine, config.moe.experts, "engine.expert_parallel"
    whole = Settings(f"{field}=1")
    if not experts:
        return ConfigError("every layer is dense", field=field, value=engine.expert_parallel, allowed="1", fix=whole)
    if experts % engine.expert_parallel:
        return ConfigError(
            f"does not divide {experts} experts",
            field=field,
            value=engine.expert_parallel,
            allowed=divisors_of(experts),
            fix=Settings(f"{field}={math.gcd(experts, engine.expert_parallel)}"),
        )
    if engine.zero_stage == 3:
        return ConfigError(
            "ZeRO 3 gathers every expert on every rank, which expert parallelism avoids: DeepSpeed has no ZeRO 3 for "
            "parameters that only some ranks hold",
            field=field,
            value=engine.expert_parallel,
            fix=either(whole, Settings("engine.zero_stage=2 engine.hpz_partition_size=1")),
        )
    if engine.compile == "block":
        return ConfigError(
            "a compiled block cannot wait for the lengths of messages between experts",
            field=field,
            value=engine.expert_parallel,
            fix=either(whole, Settings("engine.compile=none")),
        )
    return None


def _profile(config: RunConfig) -> None:
    profile = config.profile
    if profile.first_step and profile.last_step < profile.first_step:
        raise ConfigError(
            "ends before it begins",
            field="profile.last_step",
            value=profile.last_step,
            fix=Settings(f"profile.last_step={profile.first_step}"),
        )
    if profile.first_step and profile.last_step - profile.first_step >= MOST_PROFILED_STEPS:
        raise ConfigError(
            "too many steps: a profile stays in memory until its last step",
            field="profile.last_step",
            value=profile.last_step,
            allowed=f"at most {MOST_PROFILED_STEPS} steps",
            fix=Settings(f"profile.last_step={profile.first_step + MOST_PROFILED_STEPS - 1}"),
        )


def _evaluation(config: RunConfig) -> None:
    if problem := invalid_tasks([one.name for one in config.validation.sets], config.evaluation.tasks):
        raise problem


def _data(config: RunConfig) -> None:
    data = config.data
    names = [source.name for source in data.sources]
    if bool(data.train) == bool(names):
        raise ConfigError(
            "give one dataset (data.train) or several (data.sources)",
            field="data.train",
            value=data.train,
            fix=Settings("data.train=''") if names else "name one: data.train=PATH",
        )
    if len(set(names)) != len(names):
        raise ConfigError("two sources have the same name", field="data.sources", value=names)
    for index, phase in enumerate(data.phases):
        if len(phase.weights) != len(names):
            raise ConfigError(
                f"there must be one weight for each of {len(names)} sources",
                field=f"data.phases[{index}].weights",
                value=phase.weights,
            )
    for index, (before, change) in enumerate(pairwise(data.batch_schedule), 1):
        if change.start_step <= before.start_step:
            raise ConfigError(
                "is not after the change before it",
                field=f"data.batch_schedule[{index}].start_step",
                value=change.start_step,
                allowed=f"above {before.start_step}",
                fix="list the changes by ascending step",
            )
    for index, (first, last) in enumerate(data.skip_windows):
        if first >= last:
            raise ConfigError(
                "the window is empty: it skips the samples from the first number up to, but not including, the second",
                field=f"data.skip_windows[{index}]",
                value=[first, last],
                allowed="a second number above the first",
            )
    if data.packing == "best_fit" and not data.isolate_documents:
        raise ConfigError(
            "would put unrelated documents side by side in a row",
            field="data.packing",
            value=data.packing,
            fix=either(Settings("data.isolate_documents=true"), Settings("data.packing=concat")),
        )
