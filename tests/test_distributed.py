"""The place of a process among the ranks, and that all ranks leave an agreement together."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from kha_train.distributed import World, is_interactive_step, ranks_of_node, srun_meeting_point, stop
from kha_train.errors import ConfigError

WORKER = Path(__file__).with_name("agreement_worker.py")


def agreed_error() -> ConfigError:
    """One that all ranks raise together."""
    error = ConfigError("known to all")
    error.agreed = True
    return error


@pytest.fixture(scope="module")
def answers(run_ranks: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    """The results of three ranks."""
    return run_ranks(WORKER, 3)


def test_torchrun_variables_name_the_rank() -> None:
    world = World.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (world.rank, world.size, world.local_rank, world.is_main) == (5, 8, 1, False)


def test_srun_variables_name_the_rank_where_torchruns_are_missing() -> None:
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}
    assert World.from_environment(srun).rank == 3
    torchrun_inside_srun = {**srun, "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    assert World.from_environment(torchrun_inside_srun).rank == 7


PTY = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "4711"}


def test_a_shell_that_srun_opened_is_one_process_and_a_step_started_from_it_is_not(tmp_path: Path) -> None:
    assert World.from_environment(PTY).size == 1
    assert World.from_environment({**PTY, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).size == 2, (
        "torchrun inside"
    )
    for task, terminal in (("7", 34816), ("8", 0)):
        (tmp_path / task).mkdir()
        (tmp_path / task / "stat").write_text(f"{task} (a) b) S 1 {task} {task} {terminal} {task} 4194560 1 2 3")
    (tmp_path / "self").symlink_to(tmp_path / "7")
    assert is_interactive_step({**PTY, "SLURM_TASK_PID": "7"}, tmp_path)
    assert not is_interactive_step({**PTY, "SLURM_TASK_PID": "8"}, tmp_path), "srun inside the shell"
    assert is_interactive_step({**PTY, "SLURM_TASK_PID": "9"}, tmp_path), "a container: this process is asked"
    assert not is_interactive_step({"SLURM_TASK_PID": "7"}, tmp_path)


WAITING = """
from kha_train import distributed
distributed.PATIENCE_SECONDS = 0.2
try:
    distributed.start("cpu", 2.0)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_others_says_for_whom_and_how_to_go_on(clean_environment: dict[str, str]) -> None:
    alone = {**clean_environment, **PTY, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    del alone["SLURM_PTY_PORT"]
    ended = subprocess.run([sys.executable, "-c", WAITING], env=alone, capture_output=True, text=True, check=True)
    where = f"127.0.0.1:{alone['MASTER_PORT']}"
    assert f"rank 0 waits at {where} until all 2 ranks are there (SLURM_NTASKS)" in ended.stderr
    assert "unset SLURM_PROCID" in ended.stderr and "Dist" in ended.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[001-004,007]", "node001"),
        ("r[1-2]n[3,5]-gpu,x9", "r1n3-gpu"),
        ("gpu-a[12]", "gpu-a12"),
    ],
)
def test_ranks_of_srun_meet_at_the_first_node_of_their_step(nodes: str, first: str) -> None:
    srun = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0"}
    point = srun_meeting_point(srun)
    assert point == {"MASTER_ADDR": first, "MASTER_PORT": "20041"}
    assert srun_meeting_point({**srun, "SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] != point["MASTER_PORT"]
    assert srun_meeting_point({**srun, "RANK": "0"}) == {}, "torchrun inside srun has its own"
    assert srun_meeting_point({}) == {}


def test_a_process_that_nobody_launched_is_a_world_of_its_own() -> None:
    assert World.from_environment({}) == World.single()
    batch_script_without_srun = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert World.from_environment(batch_script_without_srun) == World.single()


def test_half_of_torchruns_variables_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        World.from_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),8(x2),1"}, 8),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, 2),
    ],
)
def test_the_ranks_of_a_node_are_counted_as_the_launcher_says(environ: dict[str, str], expected: int) -> None:
    assert ranks_of_node(environ) == expected


def test_all_ranks_learn_the_same_maximum_sum_and_text(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["max"] == [2, 0, 7]
        assert answer["sum"] == [6, 3]
        assert answer["text"] == "from 1: \u00fc" and answer["empty"] == ""


def test_without_an_error_no_rank_raises(answers: list[dict[str, Any]]) -> None:
    assert [answer["nothing"] for answer in answers] == [[], [], []]


def test_one_ranks_error_is_raised_by_all_with_its_kind_and_code(answers: list[dict[str, Any]]) -> None:
    told = ["DataError", 4, "rank 1: broken shard"]
    assert [answer["one"] for answer in answers] == [told, ["DataError", 4, "broken shard"], told]


def test_of_several_errors_the_first_ranks_is_everyones(answers: list[dict[str, Any]]) -> None:
    assert [answer["two"][:2] for answer in answers] == [["ConfigError", 2]] * 3


def test_an_error_that_is_not_ours_stops_the_others_too(answers: list[dict[str, Any]]) -> None:
    assert [answer["defect"][0] for answer in answers] == ["RankError", "RankError", "ZeroDivisionError"]
    assert answers[0]["defect"][1:] == [1, "rank 2: ZeroDivisionError: by zero"]


def test_a_failing_machine_is_told_from_a_mistake_by_all_ranks(answers: list[dict[str, Any]]) -> None:
    told = ["MachineError", 75, "rank 2: cannot go on: [Errno 28] No space left on device"]
    assert answers[0]["machine"] == answers[1]["machine"] == told
    assert answers[2]["machine"] == [*told[:2], told[2].removeprefix("rank 2: ")]
    assert answers[0]["mistake"][:2] == ["KhaError", 1] and "Permission denied" in answers[0]["mistake"][2]


def test_all_ranks_of_a_start_share_a_name_that_no_other_start_has(answers: list[dict[str, Any]]) -> None:
    lives = {answer["life"] for answer in answers}
    assert len(lives) == 1 and len(lives.pop()) == 12


def test_local_work_is_left_together(answers: list[dict[str, Any]]) -> None:
    assert [answer["agreed"] for answer in answers] == ["only here", "rank 0: only here", "rank 0: only here"]


def test_texts_and_numbers_travel_by_the_group_of_the_hosts_where_there_is_one(answers: list[dict[str, Any]]) -> None:
    """The other device does not exist: nobody may use it."""
    assert [answer["by_host_group"] for answer in answers] == [["from rank 1", 3]] * 3


@pytest.mark.parametrize(
    "error, ranks, backend, how",
    [
        (None, 2, "nccl", "destroy"),
        (ValueError("of this rank alone"), 2, "nccl", "abort"),
        (ValueError("of this rank alone"), 2, "gloo", "destroy"),
        (ValueError("nobody else is there"), 1, "nccl", "destroy"),
        (agreed_error(), 2, "nccl", "destroy"),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_to_leave(
    error: BaseException | None, ranks: int, backend: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("abort"))
    stop(error)
    assert done == [how]
