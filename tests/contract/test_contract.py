"""What every attention must do: base x interaction x implementation x backend, on a CPU.

The cases come from the registry and the presets: whatever is registered is covered. A pair that a variant refuses by
default is tried with the settings of `ADMITTED`; what is refused then is listed by a test of its own. Kernels in Triton
are taken in where they can run, in its interpreter (`tests/model/kernels/test_interpreted.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from kha_train.checkpoint.background import write
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import find_newest
from kha_train.config.build import build, to_plain
from kha_train.config.compose import compose, shipped
from kha_train.config.resolve import implementation, interpreted
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.decode.absorb import absorb, absorbed_config
from kha_train.distributed import World
from kha_train.engine.building import persistent_buffers
from kha_train.errors import ConfigError
from kha_train.model.attention.backends import Documents, lay_out_cached, lay_out_documents, weighted_values
from kha_train.model.attention.base import Attention, RowContext, build_attention
from kha_train.model.attention.cache import Cache
from kha_train.model.decoder import Decoder, build_decoder, build_rotary_table
from kha_train.model.device import resolve_on
from kha_train.model.init import (
    frozen_values,
    initial_value,
    initial_values,
    interaction_identities,
    reset_buffers,
)
from kha_train.model.kernels import flops
from kha_train.variants.attention import FoldableOptions, component_parameters
from kha_train.variants.backends import TRAITS
from kha_train.variants.explicit import ExplicitOptions
from kha_train.variants.registry import BASES, INTERACTIONS

SMALL = (
    "model=tiny",
    "model.layers=2",
    "model.hidden_size=32",
    "model.query_heads=4",
    "model.kv_heads=2",
    "model.head_dim=8",
    "model.vocab_size=64",
    "model.seq_len=24",
    "moe.expert_width=16",
    "engine.device=cpu",
    "engine.micro_batch_size=2",
    "run.name=contract",
)
BY_BASE = {
    "mla": ("attention.base.latent_width=12", "attention.base.rotary_dim=4"),
    # Rows of several chunks, the last of which is not full.
    "linear": ("attention.base.chunk_tokens=5",),
}
ADMITTED = {
    ("gta", "knocking_linear"): ("attention.interaction.projections=[q,v]",),
    ("gta", "explicit"): ("attention.interaction.compose=[v]",),
}
"""Settings by which a pair is possible that its presets alone refuse."""
OWN, FROZEN = "attention.interaction.share=none", "attention.interaction.train=false"
VALUES = "attention.interaction.value_only=true"
ALONE = (VALUES, "attention.interaction.projections=[v]")
FEWER = ("model.kv_heads=4", "attention.interaction.component_heads=2")
BY_LAYER = ("model.kv_heads=4", "attention.interaction.component_heads_by_layer=[2,0]")
FURTHER = (
    ("mqa", "knocking_mlp", ()),
    ("mha", "explicit", ()),
    ("gqa", "knocking_mlp", ("attention.interaction.projections=[q,k,v]",)),
    ("gqa", "explicit", ("attention.interaction.head_norm=false",)),
    ("gqa", "explicit", ("attention.interaction.mix_after_rope=true",)),
    ("gqa", "explicit", ("attention.qk_norm=none",)),
    ("gqa", "knocking_linear", ("attention.qk_norm=full_width",)),
    ("gqa", "none", ("attention.positions=alibi",)),
    ("gqa", "none", ("attention.positions=none",)),
    ("gqa", "knocking_linear", (OWN,)),
    ("gqa", "knocking_mlp", (OWN,)),
    ("gqa", "knocking_linear", (FROZEN,)),
    ("gqa", "knocking_mlp", (FROZEN,)),
    ("gqa", "knocking_gate", (FROZEN, OWN)),
    ("mla", "knocking_linear", (FROZEN, OWN)),
    ("gta", "knocking_linear", (*ALONE, OWN)),
    ("gta", "knocking_linear", (*ALONE, "attention.base.output_gate=elementwise")),
    ("gta", "knocking_mlp", (VALUES,)),
    ("gta", "knocking_gate", (VALUES,)),
    ("gqa", "explicit", FEWER),
    ("gqa", "explicit", (*FEWER, "attention.qk_norm=none")),
    ("gqa", "explicit", ("attention.interaction.component_heads=2", "attention.interaction.head_norm=false")),
    ("gqa", "explicit", (*FEWER, "attention.interaction.mix_after_rope=true")),
    ("gqa", "explicit", (*FEWER, "attention.qk_norm=full_width", "attention.positions=alibi")),
    ("gqa", "explicit", BY_LAYER),
    ("diff", "explicit", FEWER),
    ("gqa", "explicit", ("attention.interaction.component_heads=3", FROZEN)),
    ("gta", "explicit", (*FEWER, "attention.interaction.compose=[v]")),
    ("mla", "explicit", FEWER),
    ("mla", "knocking_linear", ("attention.base.query_latent_width=20",)),
    ("mla", "none", ("model.partial_rotary_factor=0.5",)),
    ("gta", "none", ("model.partial_rotary_factor=0.5",)),
    ("talking_heads", "none", ("attention.positions=alibi",)),
    ("linear", "none", ("attention.positions=none", "attention.qk_norm=none")),
    ("linear", "explicit", FEWER),
    *((base, "none", ("attention.base.output_gate=elementwise",)) for base in BASES),
    ("gqa", "none", ("attention.base.output_gate=headwise",)),
    ("gqa", "knocking_mlp", ("attention.base.output_gate=headwise",)),
    ("gqa", "knocking_mlp", ("attention.base.output_gate=elementwise",)),
    ("mla", "knocking_linear", ("attention.base.output_gate=elementwise",)),
)
"""Settings of the fields that the presets leave at one value."""
ON_KERNELS = ("model.head_dim=16", "engine.kernels=triton")
"""Heads that kernels take, and every kernel there is."""


@dataclass(frozen=True)
class Case:
    """One way to compute one attention."""

    base: str
    interaction: str
    settings: tuple[str, ...] = ()
    impl: str = "eager"
    backend: str = "eager"

    def __str__(self) -> str:
        extra = [setting.rpartition("attention.")[2] for setting in self.settings]
        return "-".join([self.base, self.interaction, *extra, self.impl, self.backend])

    @functools.cached_property
    def config(self) -> RunConfig:
        """Its configuration."""
        config = pair_config(self.base, self.interaction, self.settings)
        options = config.attention.interaction
        if isinstance(options, FoldableOptions):
            options = replace(options, impl=self.impl)
        return replace(config, attention=replace(config.attention, interaction=options, backend=self.backend))

    def overrides(self) -> list[str]:
        """Its configuration as a command line."""
        impl = [f"attention.interaction.impl={self.impl}"] if hasattr(self.config.attention.interaction, "impl") else []
        return [*pair_overrides(self.base, self.interaction, self.settings), *impl, f"attention.backend={self.backend}"]


def pair_overrides(base: str, interaction: str, settings: tuple[str, ...]) -> list[str]:
    """The presets of a base and an interaction with settings on top."""
    pair = (f"attention={base}", f"interaction@attention.interaction={interaction}")
    return [*SMALL, *pair, *BY_BASE.get(base, ()), *settings]


@functools.cache
def pair_config(base: str, interaction: str, settings: tuple[str, ...]) -> RunConfig:
    """What `pair_overrides` composes to, put together from the parts: the pairs are many, and Hydra takes a tenth of a
    second for each choice of presets."""
    of_the_model = tuple(setting for setting in settings if setting.startswith("model."))
    values = to_plain(preset(base, "none", of_the_model))
    values["attention"]["interaction"] = to_plain(preset("gqa", interaction))["attention"]["interaction"]
    for setting in settings:
        path, _, value = setting.partition("=")
        *sections, field = path.split(".")
        functools.reduce(dict.__getitem__, sections, values)[field] = yaml.safe_load(value)
    config = build(RunConfig, values)
    validate(config)
    return config


@functools.cache
def preset(base: str, interaction: str, settings: tuple[str, ...] = ()) -> RunConfig:
    """As Hydra composes it."""
    return compose(pair_overrides(base, interaction, settings))


def admitted_pairs() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every base with every interaction that it admits."""
    for base in BASES:
        for interaction in INTERACTIONS:
            settings = ADMITTED.get((base, interaction), ())
            try:
                pair_config(base, interaction, settings)
            except ConfigError as refused:
                assert refused.field.startswith("attention."), refused
                continue
            yield base, interaction, settings


def ways(base: str, interaction: str, settings: tuple[str, ...]) -> Iterator[Case]:
    """Every implementation and CPU backend of a pair."""
    config = pair_config(base, interaction, settings)
    heads, options = config.attention.base.heads(), config.attention.interaction
    impls = {"eager": settings}
    if isinstance(options, FoldableOptions):
        if options.unfoldable(heads) is None:
            impls["folded"] = settings
        if interpreted() and options.without_kernel(heads._replace(key_width=16, value_width=16)) is None:
            impls["triton"] = (*settings, *ON_KERNELS)
    for impl, chosen in impls.items():
        for backend in (name for name, traits in TRAITS.items() if not traits.cuda):
            there = replace(config, attention=replace(config.attention, backend=backend))
            if is_valid(there):
                yield Case(base, interaction, chosen, impl, backend)


def is_valid(config: RunConfig) -> bool:
    """Whether the configuration is admitted."""
    try:
        validate(config)
    except ConfigError:
        return False
    return True


def covering(cases: list[Case]) -> list[Case]:
    """Few of `cases` that hold every base, every interaction in each of its implementations, and every setting."""
    features = {case: {case.base, (case.interaction, case.impl), *case.settings} for case in cases}
    missing, chosen = set[Any]().union(*features.values()), list[Case]()
    while missing:
        chosen.append(max(cases, key=lambda case: len(features[case] & missing)))
        missing -= features[chosen[-1]]
    return chosen


PAIRS = [*admitted_pairs(), *FURTHER]
CASES = [case for pair in PAIRS for case in ways(*pair)]
DEFINITIONS = [case for case in CASES if case.impl == "eager" and case.backend == "eager"]
FASTER = [case for case in CASES if case.impl != "eager"]
IMPLEMENTATIONS = [case for case in CASES if case.backend == "eager"]
COVERING = covering(IMPLEMENTATIONS)
ABSORBED = [case for case in DEFINITIONS if absorbed_config(case.config) not in (None, case.config)]


def identities_of(config: RunConfig) -> dict[str, float | None]:
    """The matrices of an interaction and the diagonals at which heads pass unchanged."""
    return dict(config.attention.interaction.identities(config.attention.heads()))


WITH_IDENTITY = [case for case in CASES if None not in identities_of(case.config).values()]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_pair = pytest.mark.parametrize("case", DEFINITIONS, ids=str)
every_implementation = pytest.mark.parametrize("case", IMPLEMENTATIONS, ids=str)
covering_implementations = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in COVERING else pytest.mark.soak) for case in IMPLEMENTATIONS],
    ids=str,
)
"""Seconds each: the others are for `make soak`."""


def attention_of(config: RunConfig, dtype: torch.dtype = torch.float64, noise: float = 0.0) -> Attention:
    """The attention of `config` as initialised, or moved off that special point on a fixed path."""
    attention = build_attention(config, resolve_on(config, torch.device("cpu")))
    with torch.no_grad():
        for owner, local, name, value in (*initial_values(attention, 0), *frozen_values(attention, 0)):
            weight, generator = getattr(owner, local), torch.Generator().manual_seed(sum(map(ord, name)))
            weight.copy_(value() + noise * torch.randn(weight.shape, generator=generator))
    return attention.to(dtype)


def rows_of(
    config: RunConfig, batch: int, tokens: int, borders: list[int] | None = None, positions: Tensor | None = None
) -> RowContext:
    """What a decoder would hand to its layers."""
    if positions is None:
        positions = torch.arange(tokens).expand(batch, tokens)
    borders_S = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    documents = lay_out_documents(batch, tokens, torch.device("cpu"), borders_S, slopes_H=slopes(config))
    return RowContext(rotation(config, positions), documents)


def rotation(config: RunConfig, positions: Tensor) -> Any:
    table = build_rotary_table(config)
    if table is None:
        return None
    reset_buffers(table)
    return table(positions)


def slopes(config: RunConfig) -> Tensor | None:
    heads = config.attention.base.query_heads
    return torch.logspace(-1, -heads, heads, base=2.0) if config.attention.positions == "alibi" else None


def states(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Hidden states of D = 32."""
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def gradients(attention: Attention, x: Tensor, rows: RowContext) -> list[Tensor]:
    """Of a function of all outputs, with respect to the input and every parameter."""
    x = x.clone().requires_grad_()
    out = attention(x, rows)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), [x, *attention.parameters()]))


def small_decoder(config: RunConfig, noise: float = 0.1) -> Decoder:
    """A decoder off its initial point, experts in the plain loop."""
    decoder = build_decoder(replace(config, moe=replace(config.moe, backend="loop")))
    generator = torch.Generator().manual_seed(11)
    frozen = [owner.get_buffer(local) for owner, local, _, _ in frozen_values(decoder, 0)]
    with torch.no_grad():
        for weight in (*decoder.parameters(), *frozen):
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return decoder


def test_every_registered_variant_has_its_preset_and_is_covered() -> None:
    assert {path.stem for path in (shipped("configs") / "interaction").glob("*.yaml")} == set(INTERACTIONS)
    assert set(BASES) <= {path.stem for path in (shipped("configs") / "attention").glob("*.yaml")}
    assert {case.base for case in CASES} >= set(BASES)
    assert {case.interaction for case in CASES} == set(INTERACTIONS)
    assert {case.base for case in COVERING} >= set(BASES)
    assert {(case.interaction, case.impl) for case in COVERING} == {(case.interaction, case.impl) for case in CASES}


def test_a_pair_put_together_from_its_parts_is_what_its_presets_compose_to() -> None:
    for case in COVERING:
        assert case.config == compose(case.overrides()), case


@pytest.mark.parametrize("case", WITH_IDENTITY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fresh_interaction_is_the_identity_but_for_a_norm_of_the_outputs(case: Case, dtype: torch.dtype) -> None:
    config = case.config
    plain = replace(
        config, attention=replace(config.attention, interaction=pair_config("gqa", "none", ()).attention.interaction)
    )
    x, rows = states(2, 12, dtype), rows_of(config, 2, 12)
    found, expected = (attention_of(each, dtype)(x, rows) for each in (config, plain))
    options = config.attention.interaction
    if isinstance(options, ExplicitOptions) and options.head_norm:
        assert (found - expected).abs().max() > 1e-3, "the norm rescales the outputs; see MEA eq 12"
    elif isinstance(options, ExplicitOptions):
        # Composed heads lie otherwise in memory, so products may be rounded otherwise. Outputs are some 0.01 large.
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-4}
        torch.testing.assert_close(found, expected, **tolerance)
    else:
        assert torch.equal(found, expected)


@every_pair
def test_at_the_declared_identity_heads_pass_unchanged_and_every_matrix_of_an_interaction_declares_it(
    case: Case,
) -> None:
    config, options = case.config, case.config.attention.interaction
    attention = attention_of(config, noise=0.3)
    declared = interaction_identities(attention)
    promised = {**config.attention.base.identities(), **identities_of(config)}
    named = dict(attention.named_parameters()) | dict(attention.named_buffers())
    assert {name for name in named if name.startswith("interaction.") and named[name].ndim > 1} <= declared.keys()
    assert len(declared) == len(promised)
    # A variant that declares no identity promises nothing here.
    if None in promised.values() or (options.name != "none" and not identities_of(config)):
        return
    with torch.no_grad():
        for name, identity in declared.items():
            named[name].copy_(initial_value(identity, 0, name, tuple(named[name].shape)))
    assert sorted(promised.values()) == sorted(named[name].diagonal(0, -2, -1).mean().item() for name in declared)
    # Without exchange: the same base, of what the interaction holds only the norm of each head's output.
    base = "gqa" if case.base == "talking_heads" else case.base
    alone = pair_config(base, "none", tuple(each for each in case.settings if "interaction" not in each))
    if isinstance(options, ExplicitOptions) and options.head_norm:
        alone = replace(alone, attention=replace(alone.attention, interaction=replace(options, compose=())))
    expected = attention_of(replace(alone, attention=replace(alone.attention, backend="eager")))
    expected.load_state_dict({name: value for name, value in named.items() if name not in declared})
    x, rows = states(2, 12), rows_of(config, 2, 12)
    torch.testing.assert_close(attention(x, rows), expected(x, rows), rtol=1e-9, atol=1e-12)


@every_case
def test_no_token_sees_a_later_one(case: Case) -> None:
    attention, rows = attention_of(case.config, noise=0.3), rows_of(case.config, 1, 12)
    x = states(1, 12)
    before, after = attention(x, rows), attention(torch.cat((x[:, :7], states(2, 5)[1:]), dim=1), rows)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-10, atol=1e-10)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(dim=-1).min() > 1e-3


@every_case
def test_documents_of_one_row_are_as_if_alone(case: Case) -> None:
    config, attention, x = case.config, attention_of(case.config, noise=0.3), states(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    together = attention(x, rows_of(config, 1, 12, [0, 5, 12], positions))
    alone = [attention(x[:, :5], rows_of(config, 1, 5)), attention(x[:, 5:], rows_of(config, 1, 7))]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-10)
    assert (attention(x, rows_of(config, 1, 12))[:, 5:] - alone[1]).abs().max() > 1e-3


@every_case
def test_a_row_does_not_depend_on_the_rows_beside_it(case: Case) -> None:
    attention, x = attention_of(case.config, noise=0.3), states(4, 10)
    together = attention(x, rows_of(case.config, 4, 10))
    reordered = attention(x[[2, 0, 3, 1]], rows_of(case.config, 4, 10))
    torch.testing.assert_close(reordered, together[[2, 0, 3, 1]], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(attention(x[1:2], rows_of(case.config, 1, 10)), together[1:2], rtol=1e-9, atol=1e-10)


@every_case
def test_decoding_with_a_cache_gives_the_full_forward_and_keeps_what_it_says(case: Case) -> None:
    config, attention, x = case.config, attention_of(case.config, noise=0.3), states(2, 12)
    whole = attention(x, rows_of(config, 2, 12))
    cache, parts = Cache(capacity=12), []
    for start, end in ((0, 5), (5, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
        positions = torch.arange(start, end).expand(2, -1)
        documents = lay_out_cached(end - start, start, torch.device("cpu"), slopes(config))
        rows = RowContext(rotation(config, positions), documents, cache)
        rows = rows._replace(rotary_of_all=rotation(config, torch.arange(end).expand(2, -1)))
        parts.append(attention(x[:, start:end], rows))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)
    options, heads = config.interactions[0], config.attention.heads()
    composed_before = 0 if attention.interaction.folded else options.cache_numbers(heads)
    assert cache.numbers() == config.attention.base.cache_numbers() + composed_before
    assert cache.row_numbers() == config.attention.base.row_numbers()


@every_pair
def test_gradients_are_those_of_the_function(case: Case) -> None:
    attention, rows = attention_of(case.config, noise=0.3), rows_of(case.config, 1, 4)
    names = [name for name, _ in attention.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(attention, dict(zip(names, values, strict=True)), (x, rows))

    inputs = [value.detach().requires_grad_() for value in (states(1, 4), *attention.parameters())]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@every_case
def test_every_parameter_has_a_gradient_from_the_start(case: Case) -> None:
    attention = attention_of(case.config)
    for (name, _), grad in zip(
        attention.named_parameters(), gradients(attention, states(2, 12), rows_of(case.config, 2, 12))[1:], strict=True
    ):
        assert grad.isfinite().all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("case", [case for case in CASES if case.backend != "eager"], ids=str)
def test_every_backend_gives_the_numbers_of_the_formula_forward_and_backward(case: Case) -> None:
    formula = replace(case.config, attention=replace(case.config.attention, backend="eager"))
    for borders in (None, [0, 5, 12, 24]):
        rows = rows_of(case.config, 2, 12, borders)
        found, expected = (attention_of(config, noise=0.3) for config in (case.config, formula))
        torch.testing.assert_close(found(states(2, 12), rows), expected(states(2, 12), rows), rtol=1e-9, atol=1e-10)
        both = (gradients(attention, states(2, 12), rows) for attention in (found, expected))
        for got, wanted in zip(*both, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", FASTER, ids=str)
def test_a_faster_way_equals_eager_in_outputs_and_gradients(case: Case) -> None:
    rows, x = rows_of(case.config, 2, 12), states(2, 12)
    plain = tuple(setting for setting in case.settings if setting != "engine.kernels=triton")
    definition = replace(case, impl="eager", settings=plain).config
    faster, eager = (attention_of(config, noise=0.3) for config in (case.config, definition))
    assert faster.interaction.folded == implementation(case.config).folded and not eager.interaction.folded
    torch.testing.assert_close(faster(x, rows), eager(x, rows), rtol=1e-9, atol=1e-10)
    for got, wanted in zip(gradients(faster, x, rows), gradients(eager, x, rows), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ABSORBED, ids=str)
def test_absorbed_equals_unabsorbed_and_costs_nothing_extra(case: Case) -> None:
    decoder = small_decoder(case.config)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(5))
    plain = absorb(decoder)
    torch.testing.assert_close(plain(tokens).logits_BTV, decoder(tokens).logits_BTV, rtol=1e-4, atol=1e-5)
    options, heads = plain.config.attention.interaction, plain.config.attention.base.heads()
    assert options.flops(heads) == 0 and options.parameters(heads) in (0, heads.value_width)
    names = {name for name, _ in plain.named_parameters() if ".interaction." in name}
    assert names == {f"blocks.{i}.attention.interaction.norm.weight" for i in (0, 1) if options.parameters(heads)}


@every_pair
def test_the_weights_that_a_base_tells_are_shares_of_visible_tokens_and_make_its_outputs(case: Case) -> None:
    """`Attention.weights`, by which `kha analyze` sees what most backends never hold. None where a base has none."""
    attention = attention_of(case.config, noise=0.3)
    backend, told = attention.attend, []

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
        out = backend(q, k, v, documents, scale)
        told.append((attention.weights(q, k, documents, scale), v, out))
        return out

    attention.attend = attend
    attention(torch.randn(2, 6, 32, dtype=torch.float64), rows_of(case.config, 2, 6, [0, 2, 6, 12]))
    weights, v, out = told[0]
    if weights is None:
        return
    document = torch.tensor([[0, 0, 1, 1, 1, 1], [2] * 6])
    visible = (document[:, :, None] == document[:, None]) & torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.allclose(weights.sum(-1), torch.ones(1, dtype=torch.float64)) and weights.dtype == torch.float64
    assert torch.equal(weights > 0, visible[:, None].expand_as(weights))
    # A base that works on the scores mixes the weights once more, one of pairs subtracts them.
    if case.config.attention.base.asks == "softmax" and case.config.attention.base.kernel_calls == 1:
        assert torch.allclose(weighted_values(weights, v), out, atol=1e-12)


@every_pair
def test_what_cannot_be_absorbed_says_so(case: Case) -> None:
    decoder = small_decoder(case.config)
    if absorbed_config(case.config) is None:
        with pytest.raises(ConfigError, match="cannot be absorbed"):
            absorb(decoder)
    elif case.interaction == "none":
        assert absorb(decoder) is decoder


@every_implementation
def test_parameters_and_operations_are_those_of_the_real_module(case: Case) -> None:
    config, attention = case.config, attention_of(case.config)
    base, options = config.attention.base, config.interactions[0]
    heads, hidden, tokens = base.heads(), config.model.hidden_size, 2 * 12
    norms = base.norm_parameters(config.attention.qk_norm)
    real = {name: p.numel() for name, p in attention.named_parameters()}
    assert sum(n for name, n in real.items() if name.startswith("interaction.")) == options.parameters(heads)
    assert sum(buffer.numel() for buffer in attention.buffers()) == options.frozen_numbers(heads)
    outside = {name: n for name, n in real.items() if not name.startswith("interaction.")}
    assert sum(n for name, n in outside.items() if "norm" in name or name == "query_down.1.weight") == norms
    further = component_parameters(base, options, hidden)
    assert sum(outside.values()) == base.parameters(hidden) + further + norms
    expected = tokens * (base.token_flops(hidden) + 2 * further + options.flops(heads) + 12 * base.pair_flops())
    if implementation(config).folded:
        inputs = base.input_widths(hidden)
        expected += options.fold_flops(heads, inputs) - tokens * options.saved_flops(heads, inputs)
    # The formula computes the upper half of the scores as well, which is masked; the accounting counts the lower.
    assert flops.OPERATORS
    with FlopCounterMode(display=False) as counter:
        attention(states(2, 12), rows_of(config, 2, 12))
    assert counter.get_total_flops() == expected


@every_pair
def test_a_checkpoint_brings_back_the_same_function(case: Case, tmp_path: Path) -> None:
    decoder = small_decoder(case.config)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(5))
    expected = decoder(tokens).logits_BTV
    values = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    pieces = [
        Piece(name, kind, tuple(value.shape), 0, value.flatten().clone())
        for name, value in values.items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    write(tmp_path, 1, World.single(), pieces, persistent_buffers(decoder), {})
    checkpoint = find_newest(tmp_path, World.single(), report=pytest.fail)
    fresh = build_decoder(decoder.config)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(checkpoint.read(name, "master").view(checkpoint.names()[name]))
        for name, buffer in persistent_buffers(fresh).items():
            buffer.copy_(checkpoint.buffers()[name])
    assert torch.equal(fresh(tokens).logits_BTV, expected)


@pytest.mark.slow
@covering_implementations
def test_the_module_compiles_into_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    attention, rows, x = attention_of(case.config, noise=0.3), rows_of(case.config, 2, 12), states(2, 12)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rows), attention(x, rows), rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients(compiled, x, rows), gradients(attention, x, rows), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(run_ranks: Callable[..., list[Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What ZeRO 3 made of one step of every implementation that is asked for, engines built and closed in one
    process."""
    training = ["engine=zero3", "data.global_batch_size=2", "engine.micro_batch_size=2", "moe.backend=loop"]
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params["case"] for item in here if "trained" in item.fixturenames]
    cases = {str(case): [*case.overrides(), *training] for case in asked}
    return run_ranks(Path(__file__).with_name("zero3_worker.py"), 1, cases=cases)[0]


@pytest.mark.slow
@covering_implementations
def test_a_zero_3_training_step_is_that_of_plain_pytorch(case: Case, trained: dict[str, Any]) -> None:
    answer = trained[str(case)]
    assert answer["loss"] == pytest.approx(answer["plain loss"], rel=1e-5)
    assert answer["norm"] == pytest.approx(answer["plain norm"], rel=1e-4)
    assert answer["loss after"] == pytest.approx(answer["plain loss after"], rel=1e-5)
    assert answer["loss after"] < answer["loss"]
