"""Rotary embedding rotates exactly the dimensions that a configuration declares, or the configuration is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kha_train.config.compose import compose
from kha_train.config.resolve import Device, decide
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.errors import ConfigError
from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.decoder import build_decoder, build_rotary_table
from kha_train.model.device import resolve_on
from kha_train.model.init import initial_values, reset_buffers
from kha_train.variants.registry import BASES

WIDTHS = (1, 4, 6, 7, 10, 16)
SHARES = (Fraction(1), Fraction(1, 2), Fraction(1, 16), Fraction(2, 3), Fraction(3, 10), Fraction(3, 2))
TOKENS = 5


class Watched(RowContext):
    """Rows that record what was rotated, before and after."""

    seen: list[tuple[Tensor, Tensor]]

    def turn(self, x_BTHK: Tensor) -> Tensor:
        """See `RowContext.turn`."""
        turned = super().turn(x_BTHK)
        self.seen.append((x_BTHK, turned))
        return turned


def tiny(base: str, *settings: str) -> RunConfig:
    return compose([f"attention={base}", "model=tiny", "model.hidden_size=16", "model.seq_len=8", *settings])


def shaped(config: RunConfig, head_dim: int, width: int, share: Fraction) -> RunConfig:
    """Without validation: heads of `head_dim`, a rotary part of `width` where that is a setting of its own."""
    base = replace(config.attention.base, head_dim=head_dim)
    name, _ = base.rotary_setting(width)
    base = base if name == "head_dim" else replace(base, **{name: width})
    model = replace(config.model, head_dim=head_dim, partial_rotary_factor=float(share))
    return replace(config, model=model, attention=replace(config.attention, base=base))


def mended(config: RunConfig, fix: str) -> RunConfig:
    """`config` with the overrides that an error offers, as a command line would take them."""
    for setting in fix.split(" "):
        path, _, text = setting.partition("=")
        section, _, name = path.rpartition(".")
        value = float(text) if "." in text else int(text)
        if section == "model":
            config = replace(config, model=replace(config.model, **{name: value}))
        if section == "attention.base" or name == "head_dim":
            base = replace(config.attention.base, **{name: value})
            config = replace(config, attention=replace(config.attention, base=base))
    return config


def turned_by(config: RunConfig) -> set[tuple[int, ...]]:
    """The dimensions that change at some position above 0, of everything that one attention turns."""
    torch.manual_seed(0)
    rotary, table = None, build_rotary_table(config)
    if table is not None:
        reset_buffers(table)
        rotary = table(torch.arange(TOKENS)[None])
    attention = build_attention(config, resolve_on(config, torch.device("cpu")))
    for owner, local, _, value in initial_values(attention, 0):
        getattr(owner, local).data.copy_(value())
    rows = Watched(rotary, lay_out_documents(1, TOKENS, torch.device("cpu")))
    rows.seen = []
    attention(torch.randn(1, TOKENS, config.model.hidden_size), rows)
    assert rows.seen
    for before, after in rows.seen:
        assert torch.equal(before[:, 0], after[:, 0]), "position 0 is turned by nothing"
    return {tuple((before != after).flatten(0, 2).any(0).nonzero().flatten().tolist()) for before, after in rows.seen}


def grid(config: RunConfig) -> Iterator[tuple[RunConfig, Fraction]]:
    """Configurations, and the share of the rotary part that each of them declares to turn, in dimensions."""
    name, _ = config.attention.base.rotary_setting(2)
    widths = (0,) if name == "head_dim" else WIDTHS
    for head_dim, width, share in itertools.product(WIDTHS, widths, SHARES):
        case = shaped(config, head_dim, width, share)
        yield case, case.attention.base.rotary_width() * share


@pytest.mark.parametrize("base", sorted(BASES))
def test_what_is_declared_is_turned_or_the_configuration_is_refused_with_a_fix_that_works(base):
    config, accepted, refused = tiny(base), 0, 0
    for case, declared in grid(config):
        possible = (
            declared.denominator == 1 and declared % 2 == 0 and 2 <= declared <= case.attention.base.rotary_width()
        )
        try:
            validate(case)
        except ConfigError as error:
            assert not possible, error
            refused += 1
            validate(mended(case, error.fix))
            continue
        assert possible, case
        accepted += 1
        table = build_rotary_table(case)
        shapes = {buffer.shape for buffer in table.buffers()}
        reset_buffers(table)
        assert shapes == {buffer.shape for buffer in table.buffers()} == {(8, declared // 2)}
        assert turned_by(case) == {tuple(range(int(declared)))}
    assert accepted >= 5 and refused >= 5


@pytest.mark.parametrize(
    ("settings", "field", "fix"),
    [
        (("attention=mla", "model.head_dim=32", "attention.base.rotary_dim=4", "model.partial_rotary_factor=0.0625"),
         "model.partial_rotary_factor", "model.partial_rotary_factor=0.5"),
        (("attention=mla", "model.head_dim=32", "attention.base.rotary_dim=6", "model.partial_rotary_factor=0.5"),
         "model.partial_rotary_factor", "model.partial_rotary_factor=0.6666666666666666"),
        (("attention=mla", "attention.base.rotary_dim=5"), "attention.base.rotary_dim", "attention.base.rotary_dim=6"),
        (("attention=gta", "model.head_dim=12", "model.partial_rotary_factor=0.5"),
         "model.partial_rotary_factor", "model.partial_rotary_factor=0.6666666666666666"),
        (("attention=gta", "model.head_dim=6"), "model.head_dim", "model.head_dim=8"),
        (("attention=gqa", "model.head_dim=15"), "model.head_dim", "model.head_dim=16"),
        (("attention=gqa", "attention.base.head_dim=15"), "attention.base.head_dim", "attention.base.head_dim=16"),
    ],
)  # fmt: skip
def test_a_fix_is_a_command_line_that_composes(settings, field, fix):
    with pytest.raises(ConfigError) as caught:
        compose(["model=tiny", *settings])
    assert (caught.value.field, caught.value.fix) == (field, fix)
    compose(["model=tiny", *settings, *fix.split(" ")])


@pytest.mark.parametrize("positions", ["alibi", "learned", "none"])
def test_without_rotary_embedding_nothing_is_turned_and_the_share_is_not_judged_by_pairs(positions):
    settings = (f"attention.positions={positions}", "attention.backend=eager", "model.head_dim=7")
    config = tiny("gqa", *settings, "model.partial_rotary_factor=0.3")
    assert turned_by(config) == {()}
    assert build_decoder(config).rotary is None
    with pytest.raises(ConfigError, match="must be a share"):
        tiny("gqa", *settings, "model.partial_rotary_factor=1.5")


def test_the_kernel_of_norm_and_rotation_is_given_the_planes_that_are_declared():
    config = tiny("gqa", "model.head_dim=16", "model.partial_rotary_factor=0.375", "engine.kernels=triton")
    assert decide(config, Device("cuda", (9, 0))).norm.name == "triton"
    assert {buffer.shape for buffer in build_rotary_table(config).buffers()} == {(8, 3)}
