"""Saving in the background: later steps do not leak in, all ranks agree on failures and ends, only one save is in
flight.
"""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.host_buffers import HostBuffers
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import find_newest
from kha_train.distributed import World
from kha_train.errors import CheckpointError


def pieces_of(world: World, values: torch.Tensor) -> list[Piece]:
    """This rank's equal share of a parameter of two elements a rank."""
    share = values[2 * world.rank : 2 * world.rank + 2]
    return [Piece("p", kind, (2 * world.size,), 2 * world.rank, share) for kind in ("master", "exp_avg", "exp_avg_sq")]


def test_steps_taken_while_a_snapshot_is_written_do_not_leak_into_it(tmp_path) -> None:
    world, host, release = World.single(), HostBuffers(), threading.Event()

    def stage(name: str) -> None:
        if name == "first_shard":
            assert release.wait(30)

    writer = BackgroundWriter(tmp_path, world, stage=stage)
    live = torch.tensor([1.0, 2.0])
    for step in (1, 2):
        release.clear()
        live.fill_(step)
        host.restart()
        writer.begin(step, pieces_of(world, host.copy(live)), {"bias": host.copy(live)}, {})
        live.fill_(99.0)
        assert writer.poll() is None and writer.in_flight
        release.set()
        assert writer.wait().step == step
        found = find_newest(tmp_path, world, pytest.fail)
        assert found.read("p", "master").tolist() == found.buffers()["bias"].tolist() == [step, step]
    assert writer.wait() is None and writer.poll() is None


def test_host_memory_is_taken_once_and_follows_a_change_of_shape() -> None:
    host = HostBuffers()
    first = [host.copy(torch.ones(size)).data_ptr() for size in (3, 5)]
    host.restart()
    assert [host.copy(torch.zeros(size)).data_ptr() for size in (3, 5)] == first
    host.restart()
    assert host.copy(torch.arange(4.0)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("failing", ["write", "publish"])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(failing, tmp_path, run_ranks) -> None:
    rank, point = (1, "mid_shard") if failing == "write" else (0, "before_rename")

    def body(world: World) -> str:
        def stage(name: str) -> None:
            if broken and name == point and world.rank == rank:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        values, broken = torch.arange(2.0 * world.size), True
        writer = BackgroundWriter(tmp_path, world, stage=stage)
        writer.begin(1, pieces_of(world, values), {}, {})
        with pytest.raises(CheckpointError, match="No space left") as raised:
            while writer.poll() is None:
                pass
        assert not writer.in_flight
        broken = False
        writer.begin(1, pieces_of(world, values), {}, {})
        assert writer.wait().step == 1
        return str(raised.value)

    words = run_ranks(3, body)
    assert all(isinstance(word, str) for word in words), words
    assert [word.startswith(f"rank {rank}: ") for word in words] == [other != rank for other in range(3)]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_reaches_the_main_thread(tmp_path) -> None:
    def bug() -> None:
        raise ZeroDivisionError("boom")

    writer = BackgroundWriter(tmp_path, World.single(), before_publish=bug)
    writer.begin(1, pieces_of(World.single(), torch.ones(2)), {}, {})
    with pytest.raises(CheckpointError, match="thread died"):
        writer.wait()


def test_the_record_is_made_durable_before_and_retention_comes_after(tmp_path) -> None:
    order = []
    writer = BackgroundWriter(
        tmp_path,
        World.single(),
        before_publish=lambda: order.append("sync"),
        after_publish=lambda: order.append("prune"),
        stage=order.append,
    )
    writer.begin(1, pieces_of(World.single(), torch.ones(2)), {}, {})
    writer.wait()
    assert order.index("mid_shard") < order.index("sync") < order.index("before_manifest")
    assert order[-2:] == ["after_rename", "prune"]


def test_an_abandoned_save_publishes_nothing_and_the_next_process_clears_it(tmp_path) -> None:
    writer = BackgroundWriter(tmp_path, World.single())
    writer.begin(1, pieces_of(World.single(), torch.ones(2)), {}, {})
    writer.abandon()
    assert not writer.in_flight and find_newest(tmp_path, World.single(), pytest.fail) is None
    again = BackgroundWriter(tmp_path, World.single())
    again.begin(2, pieces_of(World.single(), torch.ones(2)), {}, {})
    again.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
