"""The matrices in flat shares: which numbers of a share are whole matrices, and how those that are cut come together.

A share may begin and end within a matrix, and ZeRO 3 cuts every parameter among all ranks. Of the ranks that have a
part of such a matrix, the one with the least work so far owns it: it receives the other parts, computes, and sends back
the parts of the result. All other matrices stay where they are, so under ZeRO 1 and 2 only the matrices at the borders
of shares travel, far fewer bytes than an all-gather. Every rank derives the same owners from one table of all parts.
"""

# R ranks   P parts of the rank that has most of them   N matrices   A rows   C columns

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.distributed import World
from kha_train.optim.contract import Part

Compute = Callable[[Tensor, str], None]
"""Replaces matrices [N, A, C] of the parameter of that name by others of this shape, in place."""


class _Whole(NamedTuple):
    """Consecutive matrices [N, A, C] of the parameter `name`; this rank has them from `offset` of its share on."""

    name: str
    shape: tuple[int, int, int]
    offset: int


class _Piece(NamedTuple):
    """Elements `begin` .. `begin + length` of a matrix that is cut, at `offset` of this rank's own share, or of what it
    received.
    """

    begin: int
    length: int
    is_own: bool
    offset: int


@dataclass
class ShareMatrices:
    """The matrices that this rank has in one share, or owns for it. `lent` are the (offset, length) in its share of
    what it sends, rank by rank; `sent` and `received` the numbers for and from each rank. `travels` is the same on
    every rank: whether any matrix is cut.
    """

    world: World
    travels: bool = False
    wholes: list[_Whole] = field(default_factory=list)
    owned: list[tuple[_Whole, list[_Piece]]] = field(default_factory=list)
    lent: list[tuple[int, int]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def transform(self, values: Tensor, compute: Compute) -> None:
        """Let `compute` replace the matrices in `values`, which is laid out like the share, in place. The rest of it
        (padding) stays. Collective where a matrix is cut.
        """
        guests = values.new_empty(0)
        if self.travels:
            parts = [values.narrow(0, offset, length) for offset, length in self.lent]
            guests = self.world.exchange(torch.cat([guests, *parts]), self.sent, self.received)
        for whole in self.wholes:
            compute(values.narrow(0, whole.offset, math.prod(whole.shape)).view(whole.shape), whole.name)
        for whole, pieces in self.owned:
            matrix = values.new_empty(math.prod(whole.shape))
            places = [(values if piece.is_own else guests).narrow(0, piece.offset, piece.length) for piece in pieces]
            for piece, place in zip(pieces, places, strict=True):
                matrix.narrow(0, piece.begin, piece.length).copy_(place)
            compute(matrix.view(whole.shape), whole.name)
            for piece, place in zip(pieces, places, strict=True):
                place.copy_(matrix.narrow(0, piece.begin, piece.length))
        if self.travels:
            back = self.world.exchange(guests, self.received, self.sent)
            for (offset, length), part in zip(self.lent, back.split([length for _, length in self.lent]), strict=True):
                values.narrow(0, offset, length).copy_(part)


def lay_out_matrices(
    parts: Sequence[Sequence[Part]], shapes: Mapping[str, tuple[int, ...]], maps: Mapping[str, object], world: World
) -> list[ShareMatrices | None]:
    """For each share of this rank, which holds `parts`, its matrices: the last two dimensions of every parameter in
    `maps`. None for a share that holds no such parameter on any rank; no share holds both kinds. Collective.
    """
    names = list(shapes)
    number_of = {name: number for number, name in enumerate(names)}
    offsets = {(share, part.name, part.start): part.offset for share, held in enumerate(parts) for part in held}
    layouts: dict[int, _Layout] = {}
    for rank, rows in enumerate(_table(parts, number_of, world)):
        for share, number, start, length in rows:
            name = names[number]
            if name not in maps:
                assert share not in layouts, f"{name} shares a group with matrices"
                continue
            layout = layouts.setdefault(share, _Layout(world))
            own = offsets[share, name, start] if rank == world.rank else None
            layout.add(rank, name, shapes[name], start, length, own)
    return [layouts[share].finished() if share in layouts else None for share in range(len(parts))]


def _table(parts: Sequence[Sequence[Part]], number_of: Mapping[str, int], world: World) -> list[list[list[int]]]:
    """By rank, the (share, number of the parameter, start, length) of each of its parts."""
    own = [[share, number_of[part.name], part.start, part.length] for share, held in enumerate(parts) for part in held]
    (most,) = world.max_ints(len(own))
    # Unused rows stay at length 0.
    table_RP4 = torch.zeros(world.size, most, 4, dtype=torch.int64, device=world.device)
    table_RP4[world.rank, : len(own)] = torch.tensor(own, dtype=torch.int64).view(-1, 4)
    return [[row for row in rows if row[3]] for rows in world.sum_(table_RP4).tolist()]


class _Layout:
    """The matrices of one share, from the parts of all ranks."""

    def __init__(self, world: World) -> None:
        self._found = ShareMatrices(world)
        self._cut: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._work = [0] * world.size

    def add(self, rank: int, name: str, shape: tuple[int, ...], start: int, length: int, offset: int | None) -> None:
        """A part of the parameter `name` on `rank`; `offset` is its place in this rank's own share, if it is there."""
        rows, columns = self._sizes[name] = shape[-2], shape[-1]
        size, end = rows * columns, start + length
        first, last = -(-start // size), end // size
        if first < last:
            self._work[rank] += (last - first) * size * min(rows, columns)
            if offset is not None:
                place = offset + first * size - start
                self._found.wholes.append(_Whole(name, (last - first, rows, columns), place))
        # Within one matrix `last` is below `first`, and both ends are in it.
        for number in dict.fromkeys((start // size, end // size)):
            begin, stop = max(start - number * size, 0), min(end - number * size, size)
            if begin < stop and not first <= number < last:
                place = 0 if offset is None else offset + number * size + begin - start
                self._cut.setdefault((name, number), []).append((rank, begin, stop - begin, place))

    def finished(self) -> ShareMatrices:
        """The share's matrices, once all parts were added."""
        found, own = self._found, self._found.world.rank
        found.travels = bool(self._cut)
        lent: list[list[tuple[int, int]]] = [[] for _ in self._work]
        guests: list[list[tuple[list[_Piece], int, int]]] = [[] for _ in self._work]
        for (name, _), pieces in self._cut.items():
            rows, columns = self._sizes[name]
            owner = min((rank for rank, *_ in pieces), key=self._work.__getitem__)
            self._work[owner] += rows * columns * min(rows, columns)
            if owner != own:
                lent[owner] += [(place, length) for rank, _, length, place in pieces if rank == own]
                continue
            copies = [_Piece(begin, length, True, place) for rank, begin, length, place in pieces if rank == own]
            found.owned.append((_Whole(name, (1, rows, columns), 0), copies))
            for rank, begin, length, _ in pieces:
                if rank != own:
                    guests[rank].append((copies, begin, length))
        found.lent = [piece for pieces in lent for piece in pieces]
        found.sent = [sum(length for _, length in pieces) for pieces in lent]
        found.received = [sum(length for *_, length in pieces) for pieces in guests]
        place = 0
        for copies, begin, length in (guest for group in guests for guest in group):
            copies.append(_Piece(begin, length, False, place))
            place += length
        return found
