"""Selective recomputation changes no bit, keeps what is expensive for its size, and keeps the bytes that the plan
estimates.
"""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kha_train.config.compose import compose
from kha_train.errors import ConfigError
from kha_train.estimate.activations import kept_block_numbers
from kha_train.model.decoder import build_decoder
from kha_train.model.kernels import flops as kernel_flops
from kha_train.model.moe import flops as expert_flops
from kha_train.model.recompute import kept

SHAPE = [
    "model.layers=1",
    "model.hidden_size=128",
    "model.query_heads=4",
    "model.head_dim=32",
    "model.seq_len=128",
    "model.vocab_size=64",
    "engine.micro_batch_size=2",
    "cluster=cpu",
]
FORMULAS = (kernel_flops, expert_flops)
"""Imported for what they register: the FLOPs of operators of our own."""
TOKENS = torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(0))
BORDERS = torch.tensor([0, 50, 128, 200, 256], dtype=torch.int32)


def gradients(*overrides: str) -> list[torch.Tensor]:
    decoder = build_decoder(compose([*SHAPE, "model.layers=2", *overrides]))
    out = decoder(TOKENS, TOKENS, None, BORDERS, 78)
    auxiliary = 0 if out.auxiliary is None else out.auxiliary.total_sum
    (out.loss_sum + auxiliary).backward()
    return [out.loss_sum.detach(), out.load_LE, *(p.grad for p in decoder.parameters())]


@pytest.mark.parametrize(
    "overrides",
    [
        ("attention=gqa",),
        ("attention=kha_mlp", "moe.z_loss_weight=0.01", "moe.auxiliary_loss.weight=0.01"),
        ("attention=kha_linear", "moe.shared_experts=1", "moe.dense_layers=1", "moe.dense_width=64"),
        ("attention=mla",),
        ("attention=talking_heads",),
        ("attention=mea", "moe.backend=loop"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_selective_recomputation_changes_no_bit(overrides: tuple[str, ...]) -> None:
    plain = gradients(*overrides)
    again = gradients(*overrides, "engine.activation_checkpointing=selective")
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


class Block(TorchDispatchMode):
    """For every operator of a block's forward: bytes of its result, FLOPs it took, and whether `selective` keeps it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
        # A view takes no memory, an empty tensor neither.
        if not func.is_view and sum(t.numel() for t in made):
            size = sum(t.numel() * t.element_size() for t in made)
            self.rows.append(
                (func._schema.name, size, self._flops(func, args, kwargs, out), kept(self.width, func, args))
            )
        return out

    @staticmethod
    def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
        if func._schema.name.startswith("aten::_scaled_dot_product"):
            batch, heads, tokens, width = args[0].shape
            return 2 * batch * heads * tokens * tokens * width
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            return formula(*args, **(kwargs or {}), out_val=out)
        return prod(out.shape) if isinstance(out, torch.Tensor) else 0


def forward_of_a_block(*overrides: str) -> list[tuple[str, int, int, bool]]:
    config = compose([*SHAPE, *overrides])
    decoder = build_decoder(config)
    rows = decoder._rows(2, 128, torch.arange(128).expand(2, 128), BORDERS, 78, None)
    x_BTD = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0))
    with Block(config.model.hidden_size) as seen:
        decoder.blocks[0](x_BTD, rows, torch.arange(2))
    return seen.rows


@pytest.mark.parametrize("attention", ["gqa", "kha_mlp", "kha_linear"])
def test_all_that_is_kept_saves_more_computation_a_byte_than_anything_that_is_not(attention: str) -> None:
    table = forward_of_a_block(f"attention={attention}")
    by_operator: dict[tuple[str, bool], list[float]] = {}
    for name, size, flops, keeps in table:
        by_operator.setdefault((name, keeps), []).append(flops / size)
    print(f"\n{attention}: FLOPs saved by a kept byte")
    for (name, keeps), found in sorted(by_operator.items(), key=lambda entry: -max(entry[1])):
        print(f"  {'kept' if keeps else 'again':<6}{name:<52}{min(found):8.1f} .. {max(found):.1f}")
    lowest = min(flops / size for _, size, flops, keeps in table if keeps)
    highest = max(flops / size for _, size, flops, keeps in table if not keeps)
    assert lowest > highest


@pytest.mark.parametrize(
    "overrides",
    [
        ("attention=gqa",),
        ("attention=kha_mlp",),
        ("attention=mla",),
        ("moe.shared_experts=1",),
        ("attention=gta",),
        ("attention=gated",),
        ("attention=diff",),
    ],
)
def test_the_plan_knows_what_is_kept(overrides: tuple[str, ...]) -> None:
    """Within 10 %: the block's input, and the results of the operators that are kept."""
    measured = sum(size for _, size, _, keeps in forward_of_a_block(*overrides) if keeps) + 4 * TOKENS.numel() * 128
    with_experts, _ = kept_block_numbers(compose([*SHAPE, *overrides]), 4)
    assert 4 * TOKENS.numel() * with_experts == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "overrides",
    [("engine.compile=block", "engine=zero3"), ("engine.compile=block", "engine.activation_checkpointing=selective")],
)
def test_a_compiled_block_is_refused_where_it_cannot_work(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="compiled block"):
        compose(sorted(overrides))
