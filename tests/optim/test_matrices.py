"""However parameters are cut among ranks, every matrix is computed whole, once, and its parts come back."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kha_train import compose
from kha_train.distributed import World
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import linear_maps
from kha_train.optim.contract import Part
from kha_train.optim.matrices import ShareMatrices, lay_out_matrices
from kha_train.optim.muon import Muon
from kha_train.variants.optimizer import MuonOptions

PAGE = Path(__file__).parents[2] / "docs" / "optimisers.md"
SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    ),
    min_size=1,
    max_size=4,
)


class Threads:
    """Ranks as threads of this process, which meet at a barrier."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.board = size, Barrier(size, timeout=30), dict[int, Any]()

    def told(self, rank: int, value: Any) -> list[Any]:
        """What every rank brought."""
        self.barrier.wait()
        self.board[rank] = value
        self.barrier.wait()
        return [self.board[other] for other in range(self.size)]


class ThreadWorld(World):
    """A rank among `Threads`; counts the numbers that it sends."""

    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(rank, threads.size)
        vars(self).update(threads=threads, numbers_sent=0, calls=0)

    def max_ints(self, *values: int) -> tuple[int, ...]:
        return tuple(map(max, zip(*self.threads.told(self.rank, values), strict=True)))

    def sum_(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.threads.told(self.rank, tensor)).sum(0)

    def exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        assert sum(sent) == len(values) and sent[self.rank] == received[self.rank] == 0
        vars(self).update(numbers_sent=self.numbers_sent + sum(sent), calls=self.calls + 1)
        parts = [brought[self.rank] for brought in self.threads.told(self.rank, values.split(sent))]
        assert [len(part) for part in parts] == received
        return torch.cat(parts)


def in_ranks(size: int, work: Any) -> list[Any]:
    """The results of `work(world)` on every rank."""
    threads = Threads(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadWorld(threads, rank)), range(size)))


def whole_matrix(matrices_NAC: Tensor, name: str) -> None:
    """Makes every number depend on its whole matrix, its place in it and the name."""
    matrices_NAC.copy_(matrices_NAC.cumsum(1).flip(2) + matrices_NAC.sum((1, 2), keepdim=True) + len(name))


def check(values: dict[str, Tensor], parts: list[list[list[Part]]]) -> list[ThreadWorld]:
    """`parts` of every rank and share: transforms them, compares with the whole parameters, returns the ranks."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    expected = {name: value.clone() for name, value in values.items()}
    for name, value in expected.items():
        whole_matrix(value.view(-1, *value.shape[-2:]), name)

    def work(world: ThreadWorld) -> ThreadWorld:
        layouts = lay_out_matrices(parts[world.rank], shapes, dict.fromkeys(values), world)
        for held, layout in zip(parts[world.rank], layouts, strict=True):
            share = torch.full((max((part.offset + part.length for part in held), default=0) + 3,), -7.0).double()
            for part in held:
                share[part.offset :][: part.length] = values[part.name].flatten()[part.start :][: part.length]
            assert isinstance(layout, ShareMatrices)
            layout.transform(share, whole_matrix)
            for part in held:
                assert torch.equal(
                    share[part.offset :][: part.length], expected[part.name].flatten()[part.start :][: part.length]
                )
                share[part.offset :][: part.length] = -7.0
            assert (share == -7.0).all(), "padding changed"
        return world

    return in_ranks(len(parts), work)


def drawn(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"p{'x' * n}": torch.randint(-9, 9, s, generator=generator).double() for n, s in enumerate(shapes)}


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, size=st.integers(1, 5), padding=st.integers(0, 30))
def test_a_group_cut_into_equal_shares_as_by_zero_1_and_2(
    shapes: list[tuple[int, ...]], size: int, padding: int
) -> None:
    values = drawn(shapes)
    share = -(-(sum(value.numel() for value in values.values()) + padding) // size)
    parts: list[list[list[Part]]] = [[[]] for _ in range(size)]
    place = 0
    for name, value in values.items():
        for rank in range(size):
            low, high = max(place, rank * share), min(place + value.numel(), (rank + 1) * share)
            if low < high:
                parts[rank][0].append(Part(name, low - place, high - low, low - rank * share))
        place += value.numel()
    ranks = check(values, parts)
    # At most one matrix for each border of a share travels, there and back, but for what its owner has of it.
    largest = max(math.prod(value.shape[-2:]) for value in values.values())
    assert sum(rank.numbers_sent for rank in ranks) <= 2 * (size - 1) * largest
    assert len({rank.calls for rank in ranks}) == 1


@settings(max_examples=40, deadline=None)
@given(
    shapes=SHAPES, size=st.integers(1, 4), cuts=st.lists(st.floats(0, 1), min_size=3, max_size=3), shift=st.integers(0)
)
def test_every_parameter_cut_anywhere_and_dealt_in_any_order(
    shapes: list[tuple[int, ...]], size: int, cuts: list[float], shift: int
) -> None:
    """As by ZeRO 3, expert parallelism, and by others: parameters in shares of their own."""
    values = drawn(shapes)
    parts: list[list[list[Part]]] = [[[] for _ in values] for _ in range(size)]
    for number, (name, value) in enumerate(values.items()):
        borders = sorted({0, value.numel(), *(round(cut * value.numel()) for cut in cuts[: size - 1])})
        offsets = [0] * size
        for index, (low, high) in enumerate(pairwise(borders)):
            rank = (index + shift + number) % size
            parts[rank][number].append(Part(name, low, high - low, offsets[rank]))
            offsets[rank] += high - low
    check(values, parts)


def test_one_process_sends_nothing() -> None:
    values = drawn([(2, 3, 4)])
    parts = [[[Part("p", 0, 24, 0)]]]
    assert [rank.calls for rank in check(values, parts)] == [0]


def test_work_is_divided_where_every_matrix_is_cut() -> None:
    """Eight equal matrices, each cut between four ranks: two for each."""
    shapes = {str(number): (4, 4) for number in range(8)}
    parts = [[[Part(name, 4 * rank, 4, 4 * place) for place, name in enumerate(shapes)]] for rank in range(4)]
    owned = in_ranks(4, lambda world: len(lay_out_matrices(parts[world.rank], shapes, shapes, world)[0].owned))
    assert owned == [2, 2, 2, 2]


class OneOf(World):
    """A rank that knows what all others would bring."""

    def __init__(self, rank: int, table_RP4: Tensor) -> None:
        super().__init__(rank, len(table_RP4))
        vars(self).update(table_RP4=table_RP4)

    def max_ints(self, *values: int) -> tuple[int, ...]:
        return (self.table_RP4.shape[1],)

    def sum_(self, tensor: Tensor) -> Tensor:
        return self.table_RP4


def test_what_travels_of_moe_6b_on_64_ranks_is_what_the_page_of_optimisers_says() -> None:
    size, decoder = 64, lay_out_decoder(compose(["model=moe_6b", "attention=gqa"]))
    maps, shapes = linear_maps(decoder), {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    names = {id(value): name for name, value in decoder.named_parameters()}
    sent = [0] * size
    for group in Muon.group(decoder.named_parameters(), MuonOptions(lr=1.0), (), {}, maps):
        held = {names[id(parameter)]: parameter.numel() for parameter in group["params"]}
        if not held.keys() <= maps.keys():
            continue
        share, place = -(-sum(held.values()) // size), 0
        parts: list[list[Part]] = [[] for _ in range(size)]
        for name, numel in held.items():
            for rank in range(place // share, -(-(place + numel) // share)):
                low, high = max(place, rank * share), min(place + numel, (rank + 1) * share)
                parts[rank].append(Part(name, low - place, high - low, low - rank * share))
            place += numel
        table_RP4 = torch.zeros(size, max(map(len, parts)), 4, dtype=torch.int64)
        for rank, rows in enumerate(parts):
            for row, part in enumerate(rows):
                table_RP4[rank, row] = torch.tensor([0, list(held).index(part.name), part.start, part.length])
        of_group = {name: shapes[name] for name in held}
        for rank in range(size):
            [matrices] = lay_out_matrices([parts[rank]], of_group, maps, OneOf(rank, table_RP4))
            assert matrices is not None
            # There, and back.
            sent[rank] += 4 * (sum(matrices.sent) + sum(matrices.received))
    said = re.search(r"sends (\d+) MB a step on average .* busiest (\d+) MB", PAGE.read_text().replace("\n", " "))
    assert said and [round(sum(sent) / size / 1e6), round(max(sent) / 1e6)] == [int(number) for number in said.groups()]
