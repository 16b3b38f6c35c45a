"""Several ranks inside one process: threads that meet at a barrier replace a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kha_train.checkpoint.pieces import Piece
from kha_train.distributed import World
from kha_train.errors import KhaError


@dataclass
class Meeting:
    """The state shared by the ranks of one fake world."""

    size: int
    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=30)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        seen = list(self.values)
        self.barrier.wait()
        return seen


@dataclass(frozen=True)
class ThreadWorld(World):
    """A `World` whose two primitives go through a `Meeting`; `raise_together` is the real one."""

    meeting: Meeting | None = None

    def max_ints(self, *values: int) -> tuple[int, ...]:
        return tuple(max(column) for column in zip(*self.meeting.exchange(self.rank, values), strict=True))

    def broadcast_text(self, text: str, source: int = 0) -> str:
        return self.meeting.exchange(self.rank, text)[source]


def _run_ranks(size: int, body: Callable[[World], Any]) -> list[Any]:
    """The result of `body(world)`, or the exception it raised, for each rank."""
    meeting, outcomes = Meeting(size), [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = body(ThreadWorld(rank, size, meeting=meeting))
        except (KhaError, OSError, RuntimeError) as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return outcomes


def _state(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """Three parameters with their moments, (name, kind) -> values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding.weight": (7, 5), "blocks.0.norm.weight": (5,), "blocks.0.experts.w1": (3, 4, 5)}
    return {
        (name, kind): torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }


def _own_pieces(state: dict[tuple[str, str], torch.Tensor], rank: int, size: int) -> list[Piece]:
    """An even flat cut of every tensor among the ranks; short tensors leave some ranks with nothing."""
    pieces = []
    for (name, kind), tensor in state.items():
        share = -(-tensor.numel() // size)
        start, end = min(rank * share, tensor.numel()), min((rank + 1) * share, tensor.numel())
        pieces.append(Piece(name, kind, tuple(tensor.shape), start, tensor.flatten()[start:end]))
    return pieces


@pytest.fixture(scope="session")
def run_ranks() -> Callable:
    return _run_ranks


@pytest.fixture(scope="session")
def make_state() -> Callable:
    return _state


@pytest.fixture(scope="session")
def own_pieces() -> Callable:
    return _own_pieces


@pytest.fixture(scope="session")
def save() -> Callable:
    """save(run_dir, step, seed=step, size=1, **options): write `make_state(seed)` from `size` ranks."""
    from kha_train.checkpoint.background import write

    def save(run_dir: Any, step: int, seed: int | None = None, size: int = 1, **options: Any) -> Any:
        seed = step if seed is None else seed
        state, buffers = _state(seed), {"router.bias": torch.full((4,), float(seed))}

        def body(world: World) -> Any:
            pieces = iter(_own_pieces(state, world.rank, size))
            return write(run_dir, step, world, pieces, buffers, {"seed": seed}, **options)

        if size == 1:
            return body(World.single())
        outcomes = _run_ranks(size, body)
        assert len(set(outcomes)) == 1, outcomes
        return outcomes[0]

    return save


@pytest.fixture(scope="session")
def holds() -> Callable:
    """holds(checkpoint, seed): every value of the checkpoint is bit for bit that of `make_state(seed)`."""

    def holds(checkpoint: Any, seed: int) -> bool:
        state = _state(seed)
        assert checkpoint.names() == {name: tuple(tensor.shape) for (name, _), tensor in state.items()}
        same = [torch.equal(checkpoint.read(name, kind), t.flatten()) for (name, kind), t in state.items()]
        biases = checkpoint.buffers()["router.bias"].tolist() == [seed] * 4
        return all(same) and biases and checkpoint.trainer_state == {"seed": seed}

    return holds
