"""Which tensors of a host hold the same numbers as which of ours, and in what layout: read in both directions.

A `Link` is the smallest group of tensors that follow from each other alone. Large ones are cut: experts are linked one
by one, so that neither an export nor an import holds more than one tensor of a host and its counterpart.
"""

# D model width   F feed-forward width   H heads   K, R parts of a head   N rows of a weight   E experts

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.errors import ConfigError

Tensors = tuple[Tensor, ...]


class Part(NamedTuple):
    """A parameter or buffer of ours by its full name, or of a stack of them (the experts of a layer) the one at
    place `at`.
    """

    name: str
    at: int | None = None

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from the shapes of all parameters."""
        whole = shapes[self.name]
        return whole if self.at is None else whole[1:]


class Layout(NamedTuple):
    """How tensors of ours and of a host are made of each other: functions between tuples in the order of `Link`, with
    the same numbers in both. They work on `meta` too, which gives the shapes. `to_host` raises ConfigError for values
    that the host cannot have.
    """

    to_host: Callable[[Tensors], Tensors]
    to_ours: Callable[[Tensors], Tensors]


class Link(NamedTuple):
    """Tensors of `ours` that hold what the tensors named `host` hold, in `layout`. `exact` ones stay fp32 in every
    export.
    """

    ours: tuple[Part, ...]
    host: tuple[str, ...]
    layout: Layout
    exact: bool = False

    def host_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the host, from the shapes of ours."""
        empty = tuple(torch.empty(part.shape(shapes), device="meta") for part in self.ours)
        return {name: tuple(tensor.shape) for name, tensor in zip(self.host, self.layout.to_host(empty), strict=True)}


AS_IT_IS = Layout(lambda ours: ours, lambda host: host)


GATE_AND_UP = Layout(lambda ours: ours[0].chunk(2), lambda host: (torch.cat(host),))
"""[2F, D] <-> gate [F, D], up [F, D]."""
EXPERT_GATE_AND_UP = Layout(lambda ours: ours[0].mT.chunk(2), lambda host: (torch.cat(host).mT,))
"""[D, 2F] <-> gate [F, D], up [F, D]."""


def expert_down(scale: float = 1.0) -> Layout:
    """[F, D] <-> [D, F], times `scale` in the host."""
    if scale == 1.0:
        return Layout(lambda ours: (ours[0].mT,), lambda host: (host[0].mT,))
    return Layout(lambda ours: (ours[0].mT * scale,), lambda host: (host[0].mT / scale,))


def stacked(rows: int, interleave: int = 0) -> Layout:
    """[`rows`, D] and [R, D] <-> one below the other, the second with its rotary dimensions in pairs if `interleave`
    gives the number of its heads.
    """
    return Layout(
        lambda ours: (torch.cat((ours[0], _paired(ours[1], interleave))),),
        lambda host: (host[0][:rows], _unpaired(host[0][rows:], interleave)),
    )


def heads_of(heads: int, width: int, interleave: bool = False) -> Layout:
    """[H * K, D] and [H * R, D] <-> [H * (K + R), D]: every head has a part of both, K = `width` of the first. With
    `interleave` the rotary dimensions of the second are in pairs.
    """
    turned = heads if interleave else 0

    def to_host(ours: Tensors) -> Tensors:
        first_HKD = ours[0].unflatten(0, (heads, -1))
        second_HRD = _paired(ours[1], turned).unflatten(0, (heads, -1))
        return (torch.cat((first_HKD, second_HRD), dim=1).flatten(0, 1),)

    def to_ours(host: Tensors) -> Tensors:
        both = host[0].unflatten(0, (heads, -1))
        return both[:, :width].flatten(0, 1), _unpaired(both[:, width:].flatten(0, 1), turned)

    return Layout(to_host, to_ours)


def _paired(x_ND: Tensor, heads: int) -> Tensor:
    """Rows of rotary dimensions as pairs (0, R/2), (1, R/2 + 1) and so on, in each of so many heads; 0: as they are."""
    return x_ND.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else x_ND


def _unpaired(x_ND: Tensor, heads: int) -> Tensor:
    """The inverse of `_paired`."""
    return x_ND.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else x_ND


def absent(experts: int, host: str) -> Layout:
    """A selection bias [E] of ours that `host` does not have. Its `to_host` raises ConfigError unless it is zero."""

    def to_host(ours: Tensors) -> Tensors:
        if not ours[0].is_meta and ours[0].any():
            raise ConfigError(
                f"the selection bias of experts is not zero, and {host} has none",
                field="moe.bias_update_rate",
                allowed="a run that was trained with moe.bias_update_rate=0",
            )
        return ()

    return Layout(to_host, lambda host_tensors: (torch.zeros(experts),))


def empty(*shapes: tuple[int, ...]) -> Layout:
    """Tensors without elements that a host wants and we do not have."""
    return Layout(lambda ours: tuple(torch.zeros(shape) for shape in shapes), lambda host: ())


def one(ours: str, host: str) -> Link:
    """A tensor that is the same in both."""
    return Link((Part(ours),), (host,), AS_IT_IS)
