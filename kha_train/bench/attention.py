"""What an interaction costs: forward and backward of one attention layer, every variant against plain `gqa`.

The variants take turns, one forward and backward each a round, so that a busy machine slows all of them alike; the
ratio of each round to `gqa` of the same round is kept, and the median and the quartiles over rounds are told. On a CPU
the time is that of the process, not of the wall.
"""

# B rows   T tokens   D model width

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kha_train.config.compose import compose
from kha_train.config.interaction_options import KERNEL_WIDTHS
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import Attention, RowContext, build_attention
from kha_train.model.decoder import build_rotary_table
from kha_train.model.init import initialise, reset_buffers
from kha_train.model.kernels.availability import missing

VARIANTS = {
    "gqa": ("attention=gqa",),
    "kha_linear eager": ("attention=kha_linear", "attention.interaction.impl=eager"),
    "kha_linear folded": ("attention=kha_linear", "attention.interaction.impl=folded"),
    "kha_mlp eager": ("attention=kha_mlp", "attention.interaction.impl=eager"),
    "kha_mlp folded": ("attention=kha_mlp", "attention.interaction.impl=folded"),
    "mea eager": ("attention=mea", "attention.interaction.impl=eager"),
    "mea folded": ("attention=mea", "attention.interaction.impl=folded"),
}
ON_KERNELS = {
    "gqa kernels": ("attention=gqa", "engine.kernels=triton"),
    "kha_mlp triton": ("attention=kha_mlp", "attention.interaction.impl=triton"),
    "kha_mlp kernels": ("attention=kha_mlp", "engine.kernels=triton"),
}
"""Measured too where kernels written in Triton run: norm and rotation, the perceptron, both."""


@dataclass(frozen=True)
class Ratio:
    """Seconds of a forward and backward, and its ratio to `gqa`: median and quartiles over rounds."""

    seconds: float
    ratio: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Measured:
    """The ratios by variant, and the protocol."""

    variants: dict[str, Ratio]
    rounds: int
    tokens: int
    hidden_size: int
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def measure(overrides: Sequence[str], rounds: int) -> Measured:
    """One layer of the configuration of `overrides`, a micro-batch of whole rows at a time. Raises as `compose`."""
    config = compose(overrides)
    cuda = config.engine.device != "cpu" and torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    variants = variants_for(config, device, dtype)
    layers = {name: _layer(compose([*overrides, *variant]), device, dtype) for name, variant in variants.items()}
    batch, tokens, width = config.engine.micro_batch_size, config.model.seq_len, config.model.hidden_size
    x_BTD = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows = _rows(config, batch, tokens, device)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(rounds + 1):
        for name, layer in layers.items():
            taken = _seconds(layer, x_BTD, rows)
            seconds[name] += [taken] if number else []
    return Measured(
        variants={name: _ratio(times, seconds["gqa"]) for name, times in seconds.items()},
        rounds=rounds,
        tokens=batch * tokens,
        hidden_size=width,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        dtype=str(dtype).removeprefix("torch."),
    )


def variants_for(config: RunConfig, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
    """What can be measured here: kernels only where they run, on heads they take."""
    runs = missing(device, dtype) is None and config.model.head_dim in KERNEL_WIDTHS
    return VARIANTS | (ON_KERNELS if runs else {})


def format_measured(found: Measured) -> str:
    """The figures and how they came about."""
    lines = [
        f"forward and backward of one layer, {found.tokens} tokens of width {found.hidden_size}, "
        + f"{found.device}, {found.dtype}; {found.rounds} interleaved rounds, medians (quartiles):"
    ]
    for name, ratio in found.variants.items():
        lines.append(
            f"  {name:<18} {1000 * ratio.seconds:9.2f} ms   {ratio.ratio:.3f} of gqa "
            f"({ratio.lower:.3f} to {ratio.upper:.3f})"
        )
    return "\n".join(lines)


def _layer(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Attention:
    layer = build_attention(config)
    initialise(layer, config.run.seed)
    return layer.to(device, dtype)


def _rows(config: RunConfig, batch: int, tokens: int, device: torch.device) -> RowContext:
    table = build_rotary_table(config)
    if table is not None:
        reset_buffers(table)
        table = table.to(device)
    positions_BT = torch.arange(tokens, device=device).expand(batch, tokens)
    return RowContext(None if table is None else table(positions_BT), lay_out_documents(batch, tokens, device))


def _seconds(layer: Attention, x_BTD: torch.Tensor, rows: RowContext) -> float:
    clock = time.process_time
    if x_BTD.is_cuda:
        torch.cuda.synchronize()
        clock = time.perf_counter
    started = clock()
    layer(x_BTD.requires_grad_(), rows).sum().backward()
    if x_BTD.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def _ratio(times: list[float], plain: list[float]) -> Ratio:
    lower, ratio, upper = statistics.quantiles([own / base for own, base in zip(times, plain, strict=True)], n=4)
    return Ratio(statistics.median(times), ratio, lower, upper)
