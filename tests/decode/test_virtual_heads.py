"""Compression to virtual heads: exact at full rank and for weights of low rank, in every scheme of norm and positions,
whole forwards and with a cache, whose size is that of the heads that are left.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.decode.virtual_heads import compress, compressed_config, factored
from kha_train.errors import ConfigError, DivergedError
from kha_train.estimate.counts import cache_bytes_per_token, count_parameters
from kha_train.model.attention.base import Attention
from kha_train.model.attention.cache import Cache
from kha_train.model.decoder import Decoder, build_decoder

SMALL = (
    "model.layers=2", "model.hidden_size=32", "model.head_dim=8", "model.query_heads=8", "model.kv_heads=4",
    "model.vocab_size=64", "model.seq_len=24", "moe.expert_width=16", "moe.backend=loop", "engine.device=cpu",
)  # fmt: skip
SCHEMES = list(itertools.product(("per_head", "full_width", "none"), ("rope", "alibi", "learned", "none")))


def decoder_of(*overrides: str) -> Decoder:
    """A decoder in fp64, off its initial point, so that norms and gains matter."""
    config = compose([*SMALL, *overrides])
    decoder = build_decoder(config, resolve_decoding(config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder.double()


def of_rank(decoder: Decoder, rank: int) -> Decoder:
    """The same with keys and values whose heads are combinations of `rank` heads."""
    generator = torch.Generator().manual_seed(5)
    for attention in (module for module in decoder.modules() if isinstance(module, Attention)):
        for name in ("key", "value"):
            weight = attention.get_submodule(name).weight
            heads = torch.randn(rank, weight.numel() // 4, generator=generator).double()
            mixed = torch.randn(4, rank, generator=generator).double() @ heads
            weight.data.copy_(mixed.view_as(weight))
    return decoder


def prompt() -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def decoded(decoder: Decoder) -> tuple[Tensor, int]:
    """The logits of every token when it comes after what is cached, and the numbers kept per token."""
    cache, tokens = Cache(12), prompt()
    parts = [decoder(tokens[:, first:last], cache=cache).logits_BTV for first, last in ((0, 5), (5, 6), (6, 12))]
    return torch.cat(parts, dim=1), cache.numbers()


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    found = decoder(prompt()).logits_BTV
    assert found is not None
    return found


@pytest.mark.parametrize(("norm", "positions"), SCHEMES)
def test_at_full_rank_nothing_is_lost_in_any_scheme_of_norm_and_positions(norm: str, positions: str) -> None:
    whole = decoder_of("attention=gqa", f"attention.qk_norm={norm}", f"attention.positions={positions}")
    same = compress(whole, (4, 4))
    torch.testing.assert_close(logits(same), logits(whole), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(decoded(same)[0], logits(whole), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("norm", "positions"), SCHEMES)
def test_half_the_heads_halve_the_cache_and_weights_of_half_rank_lose_nothing(norm: str, positions: str) -> None:
    whole = of_rank(decoder_of("attention=gqa", f"attention.qk_norm={norm}", f"attention.positions={positions}"), 2)
    half = compress(whole, (2, 2))
    assert half.blocks[0].attention.key.weight.shape == (2 * 8, 32)
    torch.testing.assert_close(logits(half), logits(whole), rtol=1e-8, atol=1e-9)
    (found, kept), (expected, before) = decoded(half), decoded(whole)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert kept == before / 2 == 2 * 2 * 2 * 8 == cache_bytes_per_token(half.config, 1)


def test_a_kept_rank_loses_what_the_gram_matrix_of_the_heads_says() -> None:
    """Eckart and Young: the squared error is the sum of the smallest eigenvalues of the G x G Gram matrix."""
    weight = torch.randn(4 * 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = weight.view(4, -1)
    eigenvalues = torch.linalg.eigvalsh(heads @ heads.T)
    for kept in (1, 2, 3, 4):
        found = factored(weight, 8, kept)
        made = (found.composition.T @ found.virtual.view(kept, -1)).view_as(weight)
        error = (made - weight).norm() / weight.norm()
        expected = eigenvalues[: 4 - kept].sum().clamp_min(0).sqrt() / weight.norm()
        assert error.item() == pytest.approx(expected.item(), abs=1e-12)
        assert found.lost == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_run_that_diverged_are_refused(value: float) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        factored(torch.full((8, 4), value), 2, 1)


@pytest.mark.parametrize(
    "attention",
    [
        ("attention=kha_linear",),
        ("attention=mea",),
        ("attention=mea", "attention.interaction.head_norm=false", "attention.interaction.compose=[k]"),
        ("attention=gta",),
        ("attention=diff",),
        ("attention=talking_heads",),
        ("attention=gated",),
    ],
    ids=str,
)
def test_every_base_with_cached_heads_and_every_linear_interaction_compresses(attention: tuple[str, ...]) -> None:
    """Its interaction is multiplied into the weights first; MEA's norm of the outputs stays."""
    whole = decoder_of(*attention)
    same, fewer = compress(whole, (4, 0)), compress(whole, (0, 1))
    torch.testing.assert_close(logits(same), logits(whole), rtol=1e-8, atol=1e-9)
    assert (logits(fewer) - logits(whole)).abs().max() > 1e-3
    (found, kept), before = decoded(fewer), decoded(whole)[1]
    torch.testing.assert_close(found, logits(fewer), rtol=1e-8, atol=1e-9)
    assert kept == cache_bytes_per_token(fewer.config, 1) < before
    assert sum(p.numel() for p in fewer.parameters()) == count_parameters(fewer.config).total


def test_layers_that_are_left_alone_have_the_weights_of_before() -> None:
    whole = decoder_of("attention=gqa")
    first, second = (block.attention for block in compress(whole, (0, 2)).blocks)
    assert first.key.weight is not second.key.weight and not first.interaction.state_dict()
    assert torch.equal(first.key.weight, whole.blocks[0].attention.key.weight)
    assert second.interaction.compose["k"].weight.shape == (2, 4)


@pytest.mark.parametrize(
    ("overrides", "heads", "field"),
    [
        (("attention=mla",), (2, 2), "attention.base.name"),
        (("attention=linear",), (2, 2), "attention.base.name"),
        (("attention=kha_mlp",), (2, 2), "attention.interaction.name"),
        (("attention=kha_gate",), (2, 2), "attention.interaction.name"),
        (("attention=mea", "attention.interaction.mix_after_rope=true"), (2, 2), "attention.interaction.name"),
        (("attention=mea", "attention.interaction.component_heads=2"), (1, 1), "attention.interaction"),
        (("attention=gqa",), (0, 0), "--layers"),
        (("attention=gqa",), (2,), "--layers"),
        (("attention=gqa",), (5, 0), "--kv-heads"),
    ],
    ids=str,
)
def test_what_cannot_be_compressed_is_refused_with_the_reason(
    overrides: tuple[str, ...], heads: tuple[int, ...], field: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        compressed_config(compose([*SMALL, *overrides]), heads)
    assert refused.value.field == field


def test_a_decay_towards_the_identity_which_virtual_heads_do_not_have_becomes_one_towards_zero() -> None:
    config = compose([*SMALL, "attention=kha_linear", "optim.interaction_decay=identity"])
    assert compressed_config(config, (2, 0)).optim.interaction_decay == "zero"
