"""Decides what runs on a device: precision, attention backend, kernels. There is one rule, based on plain facts of the
device and without torch. The trainer applies it to its own device, `kha plan` to those of `cluster`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, Settings, either
from kha_train.variants.attention import FoldableOptions, Implementation
from kha_train.variants.backends import TRAITS

Precision = Literal["fp32", "bf16"]
OLDEST_FOR_TRITON = (8, 0)
"""The oldest compute capability that kernels support: the first with bfloat16."""
MEGABLOCKS_INSTALL = (
    "pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1 grouped_gemm==0.3.0"
)


def _lacks_nothing(package: str) -> str | None:
    """Missing packages of another machine are unknown."""
    return None


@dataclass(frozen=True)
class Device:
    """Plain facts of a device, enough to decide what can run there.

    `capability` is that of CUDA; nothing is refused if it is unknown (None). With `interpreted`, Triton's interpreter
    replaces a GPU. `lacks(package)` says why `triton`, `flash_attn` or `megablocks` cannot be used, in words, or None.
    """

    kind: Literal["cpu", "cuda"]
    capability: tuple[int, int] | None = None
    nvidia: bool = True
    interpreted: bool = False
    lacks: Callable[[str], str | None] = _lacks_nothing


class Choice(NamedTuple):
    """The name of a backend, and the reason for the choice."""

    name: str
    why: str


class Resolved(NamedTuple):
    """What a configuration resolves to on a device. A measurement may replace a backend that `auto` selected."""

    precision: Precision
    backend: Choice


def interpreted() -> bool:
    """Whether Triton's interpreter is on (`TRITON_INTERPRET=1`): kernels then run on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def lacks_here(package: str) -> str | None:
    """Why `package` cannot be used on this machine, determined without importing it."""
    return None if find_spec(package) else "not installed"


def planned_device(config: RunConfig) -> Device:
    """The device that `config` is planned for: that of `engine.device`, or with `auto` that of `cluster`. A CPU is this
    machine's.
    """
    kind = config.cluster.device if config.engine.device == "auto" else config.engine.device
    if kind == "cpu":
        return Device("cpu", interpreted=interpreted(), lacks=lacks_here)
    major, minor = divmod(round(10 * config.cluster.capability), 10)
    return Device("cuda", (major, minor) if major else None)


def precision_on(config: RunConfig, kind: str) -> Precision:
    """The dtype of parameters and activations: `auto` is bf16 on CUDA and fp32 on a CPU, where bf16 is far slower."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if kind == "cuda" else "fp32"


def resolve(config: RunConfig, device: Device, precision: Precision | None = None) -> Resolved:
    """What `config` resolves to on `device`. Raises ConfigError when a configured choice cannot run there."""
    precision = precision or precision_on(config, device.kind)
    backend = backend_on(config, device, precision)
    interaction, moe = config.attention.interaction, config.moe
    if config.engine.kernels == "triton":
        require_triton(device, precision)
    if isinstance(interaction, FoldableOptions) and implementation(config).name == "triton":
        require_triton(device, precision, "attention.interaction.impl", "attention.interaction.impl=auto")
    if moe.backend == "megablocks" and moe.dense_layers < config.model.layers:
        problem = _cuda_problem(device, precision) or device.lacks("megablocks")
        if problem:
            raise megablocks_unavailable(problem)
    return Resolved(precision, backend)


def resolve_plan(config: RunConfig) -> Resolved:
    """What `config` resolves to on the devices of `cluster`. Raises ConfigError as `resolve`, and when `engine.device`
    requests CUDA on a cluster of CPUs.
    """
    if config.engine.device == "cuda" and config.cluster.device == "cpu":
        problem = "cluster.device=cpu has none"
        raise ConfigError(
            problem, field="engine.device", value="cuda", fix=either(Settings("engine.device=cpu"), "another cluster")
        )
    return resolve(config, planned_device(config))


def backend_on(config: RunConfig, device: Device, precision: Precision) -> Choice:
    """The attention backend. Raises ConfigError when the configured one cannot run on `device`."""
    name = config.attention.backend
    if name != "auto":
        problem = backend_problem(name, device, precision)
        if problem:
            raise ConfigError(
                problem,
                field="attention.backend",
                value=name,
                fix=either(Settings("attention.backend=sdpa"), Settings("attention.backend=auto")),
            )
        return Choice(name, "chosen by attention.backend")
    if config.attention.base.name == "talking_heads":
        return Choice("eager", "talking_heads mixes scores")
    if config.attention.positions == "alibi":
        return Choice("sdpa", "biased scores")
    if not config.data.isolate_documents:
        return Choice("sdpa", "rows are not split")
    problem = backend_problem("varlen", device, precision)
    return Choice("sdpa", f"varlen {problem}") if problem else Choice("varlen", "documents without a mask")


def backend_problem(name: str, device: Device, precision: Precision) -> str | None:
    """Why an attention backend cannot run on `device`, or None."""
    traits = TRAITS[name]
    if not traits.cuda:
        return None
    problem = _cuda_problem(device, precision)
    if problem:
        return problem
    if traits.only and device.capability not in (None, traits.only):
        return "is used on sm_90 alone (Hopper): slower on older devices, and seen to corrupt on newer ones"
    if device.capability and device.capability < traits.oldest:
        return _too_old(device.capability, traits.oldest)
    lacking = device.lacks("flash_attn") if name == "flash_attn" else None
    return f"needs the package flash-attn ({lacking}): pip install 'kha_train[gpu]'" if lacking else None


def triton_problem(device: Device, precision: Precision) -> str | None:
    """Why Triton kernels cannot run on `device`, or None."""
    lacking = device.lacks("triton")
    if lacking:
        return f"needs the package triton, which is {lacking} (pip install triton, on Linux)"
    if device.interpreted:
        return None
    if device.kind != "cuda":
        return f"needs a CUDA device, and this is {device.kind}"
    if not device.nvidia:
        return "was written for NVIDIA devices"
    if device.capability and device.capability < OLDEST_FOR_TRITON:
        return _too_old(device.capability, OLDEST_FOR_TRITON)
    return _cuda_problem(device, precision)


def require_triton(
    device: Device, precision: Precision, field: str = "engine.kernels", fix: str = "engine.kernels=torch"
) -> None:
    """Raises ConfigError, naming `field` and `fix`, when Triton kernels cannot run on `device`."""
    problem = triton_problem(device, precision)
    if problem:
        raise ConfigError(problem, field=field, value="triton", fix=Settings(fix))


def turned_dimensions(config: RunConfig) -> int:
    """How many dimensions of a query or key are rotated: the first ones of `BaseOptions.rotary_width`.

    Validation, the rotary table and its shape all use this rule. 0 without rotary embedding.
    """
    if config.attention.positions != "rope":
        return 0
    return round(config.attention.base.rotary_width() * config.model.partial_rotary_factor)


def implementation(config: RunConfig) -> Implementation:
    """How the interaction of `config` is computed in forwards of a micro-batch."""
    options, base = config.attention.interaction, config.attention.base
    if not isinstance(options, FoldableOptions):
        return Implementation("eager", "it has no other")
    tokens = config.engine.micro_batch_size * config.model.seq_len
    inputs = base.input_widths(config.model.hidden_size)
    return options.implementation(base.heads(), inputs, tokens, config.engine.kernels)


def invalid_backend(config: RunConfig) -> ConfigError | None:
    """Why the chosen backend cannot compute the configuration, or None."""
    name = config.attention.backend
    if name == "auto":
        return None
    traits = TRAITS[name]
    if traits.cuda and config.engine.device == "cpu":
        return _refused(name, "runs on CUDA alone, and engine.device=cpu")
    if traits.cuda and config.engine.precision == "fp32":
        return _refused(name, "computes in bf16, and engine.precision=fp32")
    if not traits.splits and config.data.isolate_documents:
        return _refused(
            name,
            "admits only unsplit causal rows, and data.isolate_documents=true splits rows into documents",
            Settings(
                "data.isolate_documents=false data.packing=concat",
                "{} (another experiment: tokens then see earlier documents)",
            ),
        )
    if not traits.biased and config.attention.positions == "alibi":
        return _refused(name, "adds no bias to the scores, and attention.positions=alibi")
    return None


def megablocks_unavailable(reason: str) -> ConfigError:
    """The ConfigError of a device without megablocks."""
    return ConfigError(
        f"megablocks cannot be used here ({reason})",
        field="moe.backend",
        value="megablocks",
        allowed="grouped, loop",
        fix=either(Settings("moe.backend=grouped"), f"on a CUDA machine: {MEGABLOCKS_INSTALL}"),
    )


def _cuda_problem(device: Device, precision: Precision) -> str | None:
    if device.kind != "cuda":
        return f"needs a CUDA device, and this is {device.kind}"
    return "computes in bf16, and parameters are fp32" if precision == "fp32" else None


def _too_old(capability: tuple[int, int], oldest: tuple[int, int]) -> str:
    return f"needs compute capability {oldest[0]}.{oldest[1]}, and this device has {capability[0]}.{capability[1]}"


def _refused(name: str, reason: str, *further: Settings) -> ConfigError:
    fix = either(Settings("attention.backend=sdpa"), *further)
    return ConfigError(reason, field="attention.backend", value=name, fix=fix)
