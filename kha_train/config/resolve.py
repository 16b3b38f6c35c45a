"""Decides what runs on a device: precision, attention backend, implementations, kernels. There is one rule, based on
plain facts of the device and without torch.

The trainer applies it once to its own device, reports the answer when the run starts and builds the decoder from it.
`kha plan` applies it to the devices of `cluster`; decoding uses `resolve_decoding`. Nothing else decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, Settings, either
from kha_train.variants.attention import POSITIONS, BaseOptions, Implementation
from kha_train.variants.backends import TRAITS, Asked

Precision = Literal["fp32", "bf16"]
TURNED_WIDTHS = (16, 32, 64, 128, 256)
"""Widths of heads that the kernel takes which normalises and turns them."""
OLDEST_FOR_BF16 = (8, 0)
"""The oldest compute capability that computes in bfloat16; older ones imitate it, slowly."""
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
    replaces a GPU. `lacks(name)` says why `triton`, `megablocks` or the package of an
    attention backend cannot be used, in words, or None.
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
    """What a configuration resolves to on a device: a decoder is built from it. A measurement may replace a backend
    that `auto` selected. The configuration itself stays as it was written: what runs is asked here.

    `precision` is that of parameters and activations · `backend` computes softmax(QK)V · `interaction` is how heads
    exchange information · `norm` normalises queries and keys (`triton`: one kernel with their rotation) · `experts` is
    the expert backend · `expert_kernels` compute around its products.
    """

    precision: Precision
    backend: Choice
    interaction: Implementation
    norm: Choice
    experts: Choice
    expert_kernels: Choice


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


def decide(config: RunConfig, device: Device) -> Resolved:
    """What `config` resolves to on `device`, whether or not it can run there. Estimates ask this; code that is about to
    compute asks `resolve`.
    """
    precision = precision_on(config, device.kind)
    return Resolved(
        precision,
        _backend(config, device, precision),
        implementation(config),
        _norm(config),
        Choice(config.moe.backend, "chosen by moe.backend"),
        _expert_kernels(config),
    )


def resolve(config: RunConfig, device: Device) -> Resolved:
    """What `config` resolves to on `device`. Raises ConfigError when a configured choice cannot run there."""
    resolved = decide(config, device)
    named, precision, moe = config.attention.backend, resolved.precision, config.moe
    problem = None if named == "auto" else backend_problem(named, device, precision)
    if problem:
        raise ConfigError(
            problem,
            field="attention.backend",
            value=named,
            fix=either(Settings("attention.backend=sdpa"), Settings("attention.backend=auto")),
            code="E10",
        )
    if precision == "bf16" and device.kind == "cuda" and device.capability and device.capability < OLDEST_FOR_BF16:
        raise ConfigError(
            _too_old(device.capability, OLDEST_FOR_BF16),
            field="engine.precision",
            value="bf16",
            fix=Settings("engine.precision=fp32"),
            code="E20",
        )
    if config.engine.kernels == "triton":
        require_triton(device, precision)
    if resolved.interaction.name == "triton":
        require_triton(device, precision, "attention.interaction.impl", "attention.interaction.impl=auto")
    if moe.backend == "megablocks" and moe.dense_layers < config.model.layers:
        problem = _cuda_problem(device, precision) or device.lacks("megablocks")
        if problem:
            raise megablocks_unavailable(problem)
    return resolved


def decide_plan(config: RunConfig) -> Resolved:
    """What `config` resolves to on the devices it is planned for, whether or not it can run there."""
    return decide(config, planned_device(config))


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


def resolve_decoding(config: RunConfig) -> Resolved:
    """What computes the same function while decoding, in fp32 on every device: an attention backend that supports fewer
    queries than keys; no fold, whose cost would recur for every token; torch's operators.
    """
    base, named, why = config.attention.base, config.attention.backend, "decoding"
    cached = named if named != "auto" and TRAITS[named].cached else _plain_backend(base)
    experts = config.moe.backend if config.moe.backend != "megablocks" else "loop"
    return Resolved(
        "fp32",
        Choice(cached, why),
        Implementation("eager", why),
        Choice("torch", why),
        Choice(experts, why),
        Choice("torch", why),
    )


def backend_problem(name: str, device: Device, precision: Precision) -> str | None:
    """Why an attention backend cannot run on `device`, or None."""
    traits = TRAITS[name]
    if not traits.cuda:
        return None
    problem = _cuda_problem(device, precision)
    if problem:
        return problem
    if traits.only and device.capability not in (None, traits.only):
        return f"is used on sm_{traits.only[0]}{traits.only[1]} alone (Hopper): {traits.only_because}"
    if device.capability and device.capability < traits.oldest:
        return _too_old(device.capability, traits.oldest)
    lacking = device.lacks(name) if traits.install else None
    package, _, how = traits.install.partition(": ")
    return f"needs the package {package} ({lacking}): {how}" if lacking else None


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
    if not POSITIONS[config.attention.positions].turns:
        return 0
    return round(config.attention.base.rotary_width() * config.model.partial_rotary_factor)


def implementation(config: RunConfig) -> Implementation:
    """How the interaction of `config` is computed in forwards of a micro-batch."""
    options, base = config.attention.interaction, config.attention.base
    tokens = config.engine.micro_batch_size * config.model.seq_len // config.engine.context_parallel
    inputs = base.input_widths(config.model.hidden_size)
    return options.implementation(base.heads(), inputs, tokens, config.engine.kernels)


def invalid_backend(config: RunConfig) -> ConfigError | None:
    """Why the chosen backend cannot compute the configuration, or None."""
    name = config.attention.backend
    if name == "auto":
        return None
    traits = TRAITS[name]
    base = config.attention.base
    if base.asks not in traits.serves:
        reasons: dict[Asked, str] = {
            "scores": f"{base.name} works on the scores, which only the formula itself holds",
            "linear": f"computes a softmax, and {base.name} has none",
            "softmax": f"computes linear attention, and {base.name} has a softmax",
        }
        serving = [other for other, its in TRAITS.items() if base.asks in its.serves]
        return ConfigError(
            reasons[base.asks], field="attention.backend", value=name, allowed=", ".join([*serving, "auto"])
        )
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
    if not traits.biased and POSITIONS[config.attention.positions].bias:
        return _refused(name, f"adds no bias to the scores, and attention.positions={config.attention.positions}")
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


def _backend(config: RunConfig, device: Device, precision: Precision) -> Choice:
    name, base = config.attention.backend, config.attention.base
    if name != "auto":
        return Choice(name, "chosen by attention.backend")
    if base.asks == "scores":
        return Choice(_plain_backend(base), f"{base.name} works on the scores")
    if base.asks == "linear":
        return Choice(_plain_backend(base), f"{base.name} has no softmax")
    if POSITIONS[config.attention.positions].bias:
        return Choice("sdpa", "biased scores")
    if not config.data.isolate_documents:
        return Choice("sdpa", "rows are not split")
    problem = backend_problem("varlen", device, precision)
    return Choice("sdpa", f"varlen {problem}") if problem else Choice("varlen", "documents without a mask")


def _plain_backend(base: BaseOptions) -> str:
    """The backend that runs everywhere."""
    plain: dict[Asked, str] = {"softmax": "sdpa", "scores": "eager", "linear": "chunked"}
    return plain[base.asks]


def _norm(config: RunConfig) -> Choice:
    """What normalises queries and keys. The kernel wants a norm of each head, rotary positions, and whole heads of a
    width that it takes."""
    if config.engine.kernels != "triton":
        return Choice("torch", "chosen by engine.kernels")
    attention, base = config.attention, config.attention.base
    if attention.qk_norm != "per_head":
        return Choice("torch", f"attention.qk_norm={attention.qk_norm}")
    if not POSITIONS[attention.positions].turns:
        return Choice("torch", f"attention.positions={attention.positions}")
    if not base.turns_whole_heads:
        return Choice("torch", f"{base.name} does not rotate whole heads as the norm leaves them")
    if base.head_dim not in TURNED_WIDTHS:
        low, high = TURNED_WIDTHS[0], TURNED_WIDTHS[-1]
        return Choice("torch", f"the head width {base.head_dim} is not a power of two from {low} to {high}")
    return Choice("triton", "chosen by engine.kernels")


def _expert_kernels(config: RunConfig) -> Choice:
    """What permutes, activates and combines around the products of the expert backend."""
    if config.engine.kernels != "triton":
        return Choice("torch", "chosen by engine.kernels")
    if config.moe.backend != "grouped":
        return Choice("torch", f"for grouped, not {config.moe.backend}")
    return Choice("triton", "chosen by engine.kernels")


def _cuda_problem(device: Device, precision: Precision) -> str | None:
    if device.kind != "cuda":
        return f"needs a CUDA device, and this is {device.kind}"
    return "computes in bf16, and parameters are fp32" if precision == "fp32" else None


def _too_old(capability: tuple[int, int], oldest: tuple[int, int]) -> str:
    return f"needs compute capability {oldest[0]}.{oldest[1]}, and this device has {capability[0]}.{capability[1]}"


def _refused(name: str, reason: str, *further: Settings) -> ConfigError:
    fix = either(Settings("attention.backend=sdpa"), *further)
    return ConfigError(reason, field="attention.backend", value=name, fix=fix)
