"""The estimate of what attention saves for its backward, against what torch saves: every base with every
interaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kha_train import compose
from kha_train.errors import ConfigError
from kha_train.estimate.activations import attention_activations, folded_bytes, shared_mask_bytes
from kha_train.model.attention.backends import alibi_slopes, lay_out_documents
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.attention.context import ContextRanks
from kha_train.model.device import resolve_on
from kha_train.model.init import initial_values
from kha_train.model.rope import Rotary, rotary_table
from kha_train.variants.registry import BASES, INTERACTIONS

TOKENS, WIDTH = 48, 32
SHAPE = [
    *(f"model.hidden_size={WIDTH}", "model.head_dim=16", "model.query_heads=4", f"model.seq_len={TOKENS}"),
    *("engine.micro_batch_size=1", "cluster=cpu"),
]
ON_VALUES = [
    *("attention=gta", "model.kv_heads=2", "interaction@attention.interaction=knocking_mlp"),
    "attention.interaction.value_only=true",
]
REFUSED = {("mla", "knocking_mlp"), ("mla", "knocking_gate")}


def planned_and_saved(overrides: list[str], context: ContextRanks | None = None) -> tuple[int, int]:
    """Bytes of one layer's attention on one row, or with `context` on the first rank's part of it: estimated, and
    counted by saved-tensor hooks, each storage once, without parameters, rotary tables and the mask shared by all
    layers.
    """
    ranks = context.size if context else 1
    config, own = compose([*SHAPE, *overrides, f"engine.context_parallel={ranks}"]), TOKENS // ranks
    attention = build_attention(config, resolve_on(config, torch.device("cpu")))
    base = config.attention.base
    with torch.no_grad():
        for owner, local, _, value in initial_values(attention, 0):
            getattr(owner, local).copy_(value())
    rotary, cpu = Rotary(*(t[None] for t in rotary_table(own, base.rotary_width(), 1e4))), torch.device("cpu")
    borders = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32) if config.data.isolate_documents else None
    heads = context.own_heads(alibi_slopes(base.query_heads)) if context else alibi_slopes(base.query_heads)
    slopes = torch.tensor(heads) if config.attention.positions == "alibi" else None
    documents = lay_out_documents(1, TOKENS, cpu, borders, slopes_H=slopes)
    rows = RowContext(rotary if config.attention.positions == "rope" else None, documents, context=context)
    shared = [*attention.parameters(), *rotary, *([] if documents.mask_BJTU is None else [documents.mask_BJTU])]
    left_out, kept = {tensor.untyped_storage().data_ptr() for tensor in shared}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    x_BTD = torch.randn(1, own, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(x_BTD, rows)
    planned = 4 * own * (WIDTH + attention_activations(config, 4)) + folded_bytes(config, 4)
    return planned, sum(size for size, _ in kept.values())


@pytest.mark.parametrize("split", [False, True])
def test_the_mask_of_biased_scores_is_one_for_rows_that_are_one_document(split: bool) -> None:
    rows = [f"data.isolate_documents={split}", "engine.micro_batch_size=4", "data.global_batch_size=4"]
    config = compose([*SHAPE, "attention=gqa", "attention.positions=alibi", *rows])
    borders = torch.arange(0, 4 * TOKENS + 1, TOKENS // 2 if split else TOKENS, dtype=torch.int32)
    slopes = torch.tensor(alibi_slopes(config.attention.base.query_heads))
    mask = lay_out_documents(4, TOKENS, torch.device("cpu"), borders, slopes_H=slopes).mask_BJTU
    assert mask is not None and shared_mask_bytes(config) * 4 * TOKENS == mask.numel() * mask.element_size()


def pairs() -> Iterator[Any]:
    """Every base, interaction and kind of row. Quick: every base and every interaction once, with split rows; slow: all
    pairs, and each once with whole rows; the others are for `make soak`."""
    for base, interaction, split in product(BASES, INTERACTIONS, ("true", "false")):
        once = base == "gqa" or interaction == "none"
        marks = [] if once and split == "true" else [pytest.mark.slow if once or split == "true" else pytest.mark.soak]
        yield pytest.param(base, interaction, split, marks=marks)


@pytest.mark.parametrize(("base", "interaction", "split"), list(pairs()))
def test_every_pair_that_composes_saves_what_is_reckoned(base: str, interaction: str, split: str) -> None:
    """Within 15 %: small matrices and an interaction's second use of a tensor are not estimated."""
    overrides = [f"attention={base}", f"interaction@attention.interaction={interaction}"]
    if base == "mla":
        overrides += ["attention.base.latent_width=24", "attention.base.rotary_dim=8"]
    if base == "gta" and interaction != "none":
        field = "compose" if interaction == "explicit" else "projections"
        overrides.append(f"attention.interaction.{field}=[v]")
    if (base, interaction) in REFUSED:
        with pytest.raises(ConfigError):
            compose(overrides)
        return
    planned, saved = planned_and_saved([*overrides, f"data.isolate_documents={split}"])
    assert planned == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=gqa", "model.kv_heads=2", "attention.backend=eager"],
        ["attention=gqa", "model.kv_heads=2", "attention.backend=eager", "attention.positions=alibi"],
        ["attention=gqa", "model.kv_heads=2", "attention.positions=alibi"],
        ["attention=gqa", "model.kv_heads=2", "attention.qk_norm=none"],
        ["attention=gqa", "model.kv_heads=2", "attention.qk_norm=full_width"],
        ["attention=talking_heads", "model.kv_heads=2"],
        ["attention=gta", "model.kv_heads=2"],
        ["attention=gated", "model.kv_heads=2"],
        ["attention=linear", "model.kv_heads=2", "attention.base.chunk_tokens=16"],
        ["attention=linear", "model.kv_heads=2", "attention.backend=eager", "attention.qk_norm=none"],
        ["attention=gated_headwise", "model.kv_heads=2", "attention.backend=eager"],
        ["attention=kha_mlp", "attention.interaction.impl=folded"],
        ["attention=kha_mlp", "attention.interaction.impl=eager"],
        ["attention=kha_mlp", "attention.interaction.impl=eager", "attention.interaction.train=false"],
        ["attention=kha_linear", "attention.interaction.impl=eager", "attention.interaction.train=false"],
        ["attention=mea", "attention.interaction.impl=eager", "attention.interaction.train=false"],
        ["attention=kha_mlp", "attention.interaction.impl=eager", "attention.interaction.share=none"],
        ["attention=kha_mlp", "attention.interaction.impl=folded", "attention.interaction.share=none"],
        [*ON_VALUES, "attention.interaction.impl=eager"],
        [*ON_VALUES, "attention.interaction.impl=folded", "data.isolate_documents=false"],
        ["attention=mea", "attention.interaction.impl=eager", "attention.interaction.component_heads=2"],
        ["attention=mea", "attention.interaction.impl=folded", "attention.interaction.component_heads=2"],
    ],
    ids=" ".join,
)
def test_backends_norms_and_positions_are_reckoned(overrides: list[str]) -> None:
    planned, saved = planned_and_saved(overrides)
    assert planned == pytest.approx(saved, rel=0.1)


@pytest.fixture
def two_ranks() -> Iterator[ContextRanks]:
    """The first of two ranks that share rows. The other does not exist: what arrives from it is a copy."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield ContextRanks(dist.group.WORLD, 0, 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=gqa", "model.kv_heads=2"],
        ["attention=gqa", "model.kv_heads=2", "data.isolate_documents=false"],
        ["attention=gqa", "model.kv_heads=2", "attention.backend=eager"],
        ["attention=mqa"],
        ["attention=mha", "attention.positions=alibi"],
        ["attention=gta", "model.kv_heads=2"],
        ["attention=mla", "attention.base.latent_width=24", "attention.base.rotary_dim=8"],
        ["attention=diff", "model.kv_heads=4"],
        ["attention=gated"],
        ["attention=kha_mlp"],
    ],
    ids=" ".join,
)
def test_what_a_rank_saves_of_rows_that_it_shares_is_reckoned(overrides: list[str], two_ranks: ContextRanks) -> None:
    planned, saved = planned_and_saved(overrides, two_ranks)
    assert planned == pytest.approx(saved, rel=0.05)
