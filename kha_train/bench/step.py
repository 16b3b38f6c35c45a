"""Times the training step: variants of one configuration, and a peer, take turns in one process.

A step is everything that training does between reading a batch and knowing its loss: forward and backward of every
micro-batch, agreement among ranks, the gate, clipping, AdamW, the update of the selection biases. All arms get the same
batches. An arm is a list of settings on top of those of the configuration. The first arm is the base of the ratios, so
any setting can be compared with any other.

MFU = (6 x active matrix parameters + 6 S H K L, causal attention once) x tokens/s / peak; `mfu_palm` counts attention
whole, 12 S H K L; `mfu_documents` counts the attention that the rows of these batches need: the squared lengths of
their documents instead of the row's. The peer uses the same numerators. None counts recomputation.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_tools.synthetic import write_dataset
from kha_train import distributed
from kha_train.bench import protocol
from kha_train.bench.peers import Adapter, load_adapters
from kha_train.config.compose import compose
from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.data.stream import open_stream
from kha_train.distributed import World
from kha_train.engine.building import resolve_dtype
from kha_train.engine.contract import Engine
from kha_train.engine.default import engine_for
from kha_train.estimate.counts import count_parameters, flops_per_token
from kha_train.model.attention import measured
from kha_train.model.attention.choice import announce
from kha_train.model.device import resolve_on
from kha_train.model.kernel_choice import measure_kernels, with_kernels
from kha_train.model.moe.experts import announce_experts
from kha_train.record.labels import distinct
from kha_train.telemetry.throughput import Peak, peak_flops
from kha_train.train.layer_statistics import is_due
from kha_train.train.step import train_step

ARMS = ("attention=gqa", "attention=kha_linear", "attention=kha_mlp")
SHAPES = {
    "small": ("model=small", "data.global_batch_size=4"),
    "quickstart": ("model=tiny", "data.global_batch_size=8"),
}
"""The shapes measured when no configuration is given: the reference shape, and what `kha quickstart` trains."""
BATCHES = 8


@dataclass
class Arm:
    """One arm: the function of its step, its settings, and the memory it holds."""

    step: Callable[[Batch], object]
    config: RunConfig
    own_bytes: int
    about: dict[str, Any]
    peak_bytes: int = 0


def measure(
    overrides: Sequence[str],
    arms: Sequence[str] = ARMS,
    *,
    against: Sequence[str] = (),
    peers: Path | None = None,
    blocks: int = 20,
    steps: int = 1,
    warmup: int = 2,
    clock: protocol.Clock = "wall",
) -> dict[str, Any]:
    """Measure every arm of `arms` (settings, separated by spaces) on top of `overrides`, and the peers of `against`,
    whose adapters are in the folder `peers`.

    Uses the data of `data.train` when the overrides set it, otherwise synthetic data. Raises as `compose`; ConfigError
    for an unavailable peer, or one without such a model.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as left_last:
        settings = _with_data(list(overrides), Path(folder))
        # An arm may be measured against itself.
        labels = distinct(arms, [f"arm {number}" for number, _ in enumerate(arms, start=1)])
        configs = {label: compose([*settings, *arm.split()]) for label, arm in zip(labels, arms, strict=True)}
        first = next(iter(configs.values()))
        adapters = load_adapters(peers, against)
        for adapter in adapters.values():
            adapter.check(first)
        world = distributed.start(first.engine.device, first.engine.collective_timeout_seconds)
        left_last.push(lambda kind, error, trace: distributed.stop(error))
        for engine in {engine_for(config, world.size) for config in configs.values()}:
            left_last.push(partial(_leave, engine))
        batches = _batches(first)
        settled = _settled(configs, world.device)
        contenders = {name: _ours(arm, world, left_last) for name, arm in settled.items()}
        contenders |= {name: _peer(adapter, first, world, batches[0]) for name, adapter in adapters.items()}
        seconds = _take_turns(contenders, batches, world, blocks=blocks, steps=steps, warmup=warmup, clock=clock)
    protocol_facts = {"blocks": blocks, "steps": steps, "warmup": warmup, "clock": clock}
    return _answer(contenders, seconds, first, world.device, protocol_facts, attended_share(batches))


def attended_share(batches: Sequence[Batch]) -> float:
    """Token pairs inside the documents of `batches`, relative to whole rows: sum of len^2 / (rows x T^2)."""
    pairs = sum(int(np.square(np.diff(batch.layout.borders_S.astype(np.int64))).sum()) for batch in batches)
    whole: int = sum(batch.rows_BW.shape[0] * (batch.rows_BW.shape[1] - 1) ** 2 for batch in batches)
    return pairs / whole


def use_threads(count: int) -> None:
    """Let torch compute with `count` threads; 0 keeps the current number."""
    if count:
        torch.set_num_threads(count)


def _leave(engine: type[Engine], kind: object, error: BaseException | None, trace: object) -> None:
    engine.leave_world(error)


def _with_data(overrides: list[str], folder: Path) -> list[str]:
    """The overrides, with synthetic documents (mean length about 280 tokens) where they name no data."""
    if any(text.startswith(("data.train=", "data.sources=")) for text in overrides):
        return overrides
    vocab_size = compose(overrides).model.vocab_size
    write_dataset(folder, vocab_size=vocab_size, documents=800)
    return [*overrides, f"data.train={folder}/train", f"data.validation={folder}/validation"]


def _batches(config: RunConfig) -> list[Batch]:
    return list(itertools.islice(open_stream(config), BATCHES))


class Settled(NamedTuple):
    """An arm as training would run it on this device."""

    config: RunConfig
    resolved: Resolved


def _settled(configs: Mapping[str, RunConfig], device: torch.device) -> dict[str, Settled]:
    """Every arm with the attention backend and the kernels that training would choose. Arms with `auto` share those of
    the first one that has them if they can run them; otherwise a ratio would compare two backends instead of two arms.
    """
    found: dict[str, Settled] = {}
    backend, kernels = "", dict[str, str]()
    for name, given in configs.items():
        config, _ = measured.settled(given, measured.measure(given, device, backend))
        resolved = resolve_on(config, device)
        selected = measure_kernels(config, resolved, device, kernels).selected
        found[name] = Settled(config, with_kernels(config, resolved, selected, device))
        if given.attention.backend == "auto":
            backend = backend or config.attention.backend
        kernels = {**selected, **kernels}
    return found


def _ours(settled: Settled, world: World, left_last: ExitStack) -> Arm:
    before = _allocated(world.device)
    config, resolved = settled
    engine = engine_for(config, world.size)(config, world, resolved=resolved)
    left_last.callback(engine.close)
    lr, steps = config.optim.lr * 0.1, itertools.count(1)

    def step(batch: Batch) -> None:
        train_step(engine, batch, batch.label_count, lr, observed=is_due(config, next(steps)))

    place = (resolved, world.device)
    chosen = [*announce(config, *place), *announce_experts(config, *place)]
    about = {"backend": resolved.backend.name, "chosen": chosen, "config": protocol.config_hash(config)}
    return Arm(step, config, _allocated(world.device) - before, about)


def _peer(adapter: Adapter, config: RunConfig, world: World, batch: Batch) -> Arm:
    before = _allocated(world.device)
    peer, tried = adapter.fastest(config, batch, world.device, resolve_dtype(config, world.device))
    about = {"experts": peer.experts, "experts_tried": tried}
    return Arm(peer.step, config, _allocated(world.device) - before, about)


def _take_turns(contenders: dict[str, Arm], batches: list[Batch], world: World, **how: Any) -> dict[str, list[float]]:
    """Every arm runs through the same batches in the same order. On CUDA the peak of an arm is what its step adds to
    the memory already in use, plus what the arm holds itself.
    """

    def stepper(arm: Arm) -> Callable[[], None]:
        turn: Iterator[Batch] = itertools.cycle(batches)

        def step() -> None:
            with _watched(arm, world.device):
                arm.step(next(turn))

        return step

    arms = {name: stepper(arm) for name, arm in contenders.items()}
    return protocol.interleave(arms, device=world.device, **how)


@contextmanager
def _watched(arm: Arm, device: torch.device) -> Iterator[None]:
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        extra = torch.cuda.max_memory_allocated(device) - before
        arm.peak_bytes = max(arm.peak_bytes, arm.own_bytes + extra)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _answer(
    contenders: dict[str, Arm],
    seconds: dict[str, list[float]],
    config: RunConfig,
    device: torch.device,
    protocol_facts: dict[str, Any],
    attended: float,
) -> dict[str, Any]:
    dtype = resolve_dtype(config, device)
    peak = peak_flops(config, device, dtype)
    base = next(iter(contenders))
    tokens = config.data.global_batch_size * config.model.seq_len
    parameters = count_parameters(config)
    return {
        "shape": {
            "model": config.model.name,
            "parameters": parameters.total,
            "active": parameters.active,
            "tokens_per_step": tokens,
            "seq_len": config.model.seq_len,
            "micro_batch_size": config.engine.micro_batch_size,
            "isolate_documents": config.data.isolate_documents,
            "attended_share": attended,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "protocol": protocol_facts,
        "environment": protocol.environment(device),
        "peak": {"flops_per_second": peak.flops_per_second, "source": peak.source},
        "base": base,
        "arms": {
            name: _figures(arm, seconds[name], seconds[base], tokens, peak, attended) | arm.about
            for name, arm in contenders.items()
        },
    }


def _figures(
    arm: Arm, seconds: list[float], base: list[float], tokens: int, peak: Peak, attended: float
) -> dict[str, Any]:
    taken = protocol.timing(seconds)
    flops = flops_per_token(arm.config)
    speed = tokens / taken.seconds
    return {
        **protocol.plain(taken),
        "against_base": protocol.plain(protocol.compare(seconds, base)),
        "tokens_per_second": speed,
        "mfu": flops.mfu * speed / peak.flops_per_second,
        "mfu_documents": (flops.mfu - (1 - attended) * (flops.mfu_palm - flops.mfu)) * speed / peak.flops_per_second,
        "mfu_palm": flops.mfu_palm * speed / peak.flops_per_second,
        "peak_gib": arm.peak_bytes / 2**30 if arm.peak_bytes else None,
        "block_seconds": seconds,
    }


def format_measured(found: dict[str, Any]) -> str:
    """The figures and their protocol, as text."""
    shape, how = found["shape"], found["protocol"]
    rows = "isolated documents" if shape["isolate_documents"] else "unsplit rows"
    what = (
        f"{shape['model']}: {shape['parameters']:,} parameters, {shape['tokens_per_step']:,} tokens a step in rows of "
        f"{shape['seq_len']}, micro-batches of {shape['micro_batch_size']}, {rows}, {shape['dtype']}"
    )
    protocol_line = (
        f"{how['blocks']} interleaved blocks of {how['steps']} steps, {how['clock']} clock; medians, ratio to "
        f"{found['base']} with its 95 % interval; {protocol.told(found['environment'])}"
    )
    lines = [what, protocol_line]
    for name, arm in found["arms"].items():
        ratio, memory = arm["against_base"], arm["peak_gib"]
        held = "" if memory is None else f", peak {memory:.1f} GiB"
        taken = f" (experts: {arm['experts']})" if "experts" in arm else f" ({arm['backend']})"
        lines.append(
            f"  {name:<28} {1000 * arm['seconds']:9.1f} ms  {protocol.shown(ratio, how['blocks'])}  "
            f"{arm['tokens_per_second']:,.0f} tokens/s, MFU {100 * arm['mfu']:.1f} % "
            f"(by documents {100 * arm['mfu_documents']:.1f} %, PaLM's {100 * arm['mfu_palm']:.1f} %){held}{taken}"
        )
    return "\n".join(lines)
