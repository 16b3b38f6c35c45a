"""Measures what an interaction costs: forward and backward of one attention layer, every variant against plain
`gqa`.
"""

# B rows   T tokens   D model width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kha_train.bench.protocol import Clock, Ratio, Timing, compare, environment, interleave, plain, shown, timing, told
from kha_train.config.compose import compose
from kha_train.config.resolve import Precision, triton_problem
from kha_train.config.schema import RunConfig
from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import Attention, RowContext, build_attention
from kha_train.model.decoder import build_rotary_table
from kha_train.model.device import DTYPES, device_facts, resolve_on
from kha_train.model.host import use_tensor_cores
from kha_train.model.init import initialise, reset_buffers
from kha_train.variants.interactions import KERNEL_WIDTHS

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
"""Also measured where Triton kernels run: norm and rotation, the perceptron, both."""
_PRECISIONS: dict[bool, Precision] = {True: "bf16", False: "fp32"}
"""Measured on CUDA, and on a CPU."""


@dataclass(frozen=True)
class Measured:
    """Seconds of a forward and backward and the ratio to `gqa`, by variant, with the measurement protocol."""

    seconds: dict[str, Timing]
    against_gqa: dict[str, Ratio]
    blocks: int
    clock: Clock
    tokens: int
    hidden_size: int
    dtype: str
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def measure(overrides: Sequence[str], blocks: int, clock: Clock = "wall") -> Measured:
    """Measure one layer of the configuration of `overrides`, with one micro-batch of whole rows at a time. Raises as
    `compose`, and as `resolve` for what a run could not begin with here, experts included.
    """
    config = compose(overrides)
    cuda = config.engine.device != "cpu" and torch.cuda.is_available()
    device, precision = torch.device("cuda" if cuda else "cpu"), _PRECISIONS[cuda]
    dtype = DTYPES[precision]
    if cuda:
        use_tensor_cores(dtype)
    batch, tokens, width = config.engine.micro_batch_size, config.model.seq_len, config.model.hidden_size
    x_BTD = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows = _rows(config, batch, tokens, device)
    arms = {
        name: _pass(_layer(compose([*overrides, *variant]), device, precision), x_BTD, rows)
        for name, variant in variants_for(config, device, precision).items()
    }
    seconds = interleave(arms, blocks=blocks, device=device, clock=clock)
    return Measured(
        seconds={name: timing(taken) for name, taken in seconds.items()},
        against_gqa={name: compare(taken, seconds["gqa"]) for name, taken in seconds.items()},
        blocks=blocks,
        clock=clock,
        tokens=batch * tokens,
        hidden_size=width,
        dtype=str(dtype).removeprefix("torch."),
        about=environment(device),
    )


def variants_for(config: RunConfig, device: torch.device, precision: Precision) -> dict[str, tuple[str, ...]]:
    """The variants that can be measured here: kernels only where they run, and only for supported head sizes."""
    runs = triton_problem(device_facts(device), precision) is None and config.model.head_dim in KERNEL_WIDTHS
    return VARIANTS | (ON_KERNELS if runs else {})


def format_measured(found: Measured) -> str:
    """The figures and their protocol, as text."""
    lines = [
        f"forward and backward of one layer, {found.tokens} tokens of width {found.hidden_size}, {found.dtype}",
        f"{found.blocks} interleaved blocks, {found.clock} clock; medians, ratio to gqa with its 95 % interval; "
        + told(found.about),
    ]
    for name, taken in found.seconds.items():
        ratio = found.against_gqa[name]
        lines.append(f"  {name:<18} {1000 * taken.seconds:9.2f} ms  {shown(plain(ratio), found.blocks)}")
    return "\n".join(lines)


def _layer(config: RunConfig, device: torch.device, precision: Precision) -> Attention:
    engine, data = replace(config.engine, precision=precision), replace(config.data, isolate_documents=False)
    layer = build_attention(config, resolve_on(replace(config, engine=engine, data=data), device))
    initialise(layer, config.run.seed)
    return layer.to(device, DTYPES[precision])


def _rows(config: RunConfig, batch: int, tokens: int, device: torch.device) -> RowContext:
    table = build_rotary_table(config)
    if table is not None:
        reset_buffers(table)
        table = table.to(device)
    positions_BT = torch.arange(tokens, device=device).expand(batch, tokens)
    return RowContext(None if table is None else table(positions_BT), lay_out_documents(batch, tokens, device))


def _pass(layer: Attention, x_BTD: torch.Tensor, rows: RowContext) -> Callable[[], None]:
    def forward_and_backward() -> None:
        layer(x_BTD.requires_grad_(), rows).sum().backward()

    return forward_and_backward
