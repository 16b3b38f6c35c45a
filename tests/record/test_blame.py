"""Finding the first failure among the files of a start: never a rank whose connection broke because another one was
gone.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kha_train.record import first_failure, first_failure_line
from kha_train.record.blame import blame, is_consequence

RESET = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:536] Read error [127.0.0.1]:45678: "
    "Connection reset by peer"
)
RESET_IN_SHORT = "RuntimeError: Read error [127.0.0.1]:45678: Connection reset by peer"
BROKEN = {
    "gloo, reset": RESET,
    "gloo, closed": "RuntimeError: [pair.cc:547] Connection closed by peer [10.0.0.1]:51234",
    "gloo, write": "RuntimeError: [pair.cc:400] writev [10.0.0.1]:51234: Broken pipe",
    "gloo, time": "RuntimeError: [unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "gloo, pair": "RuntimeError: [pair.cc:1024] Application timeout caused pair closure",
    "store": "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
    "socket": "ConnectionResetError: [Errno 104] Connection reset by peer",
    "nccl": "DistBackendError: NCCL error: remote process exited or there was a network error; ncclRemoteError",
    "nccl, abort": "DistBackendError: NCCL communicator was aborted on rank 3",
}
OWN = {
    "a defect": "ZeroDivisionError: division by zero",
    "the data store": "data error: s3://bucket/shard: cannot be read: Connection reset by peer",
    "the machine": "machine error: cannot read the batch: [Errno 104] Connection reset by peer",
    "memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
}


def failure(rank: int, time: float, error: str, **more: Any) -> dict[str, Any]:
    """What a rank writes."""
    return {"rank": rank, "time": time, "error": error, "traceback": "", **more}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_connection_is_a_consequence(case: str) -> None:
    assert is_consequence(BROKEN[case])
    found = blame([failure(1, 5.0, BROKEN[case])], 2, {0: 4.0, 1: 5.0})
    assert found is not None and found["rank"] == 0 and found["error"].startswith("died without a message")


def test_of_what_a_library_says_of_a_broken_connection_the_first_clause_is_told() -> None:
    said = f"{RESET}. This means a remote gloo rank was unexpectedly terminated \U0001f480; look there\nframe 0"
    found = blame([failure(1, 5.0, said)], 2, {})
    assert found is not None and found["error"].endswith(f"lost its connection: {RESET_IN_SHORT}")


@pytest.mark.parametrize("case", OWN)
def test_an_error_of_its_own_is_a_cause_although_others_lost_their_connection_before(case: str) -> None:
    assert not is_consequence(OWN[case])
    own = failure(2, 6.0, OWN[case])
    assert blame([failure(0, 5.0, RESET), own, failure(1, 4.0, RESET)], 4, {}) == own


def test_the_earliest_of_several_causes_began() -> None:
    causes = [failure(rank, 9.0 - rank, OWN["a defect"]) for rank in range(3)]
    assert blame(causes, 4, {}) == causes[2]


def test_of_the_silent_the_one_heard_of_least_recently_began_and_the_others_are_named() -> None:
    found = blame([failure(1, 20.0, RESET)], 5, {0: 15.0, 1: 19.0, 2: 11.0, 3: 18.0, 4: 18.0})
    assert found is not None and found["rank"] == 2
    assert "nothing was heard from rank 0, 3, 4 either" in found["error"]
    assert found["error"].endswith(f"rank 1 lost its connection: {RESET_IN_SHORT}")


def test_a_silent_rank_that_was_never_seen_began() -> None:
    found = blame([failure(1, 20.0, RESET)], 3, {1: 19.0, 2: 18.0})
    assert found is not None and found["rank"] == 0


def test_what_all_agreed_on_is_told_of_the_rank_it_happened_to() -> None:
    agreed = failure(0, 5.0, "data error: rank 1: shard-00000.tok: damaged")
    own = failure(1, 6.0, "data error: shard-00000.tok: damaged")
    assert blame([agreed, own], 2, {}) == own
    found = blame([agreed, failure(2, 4.0, RESET)], 3, {})
    assert found is not None and found["rank"] == 1 and found["error"] == f"rank 0 reports: {agreed['error']}"


def test_a_rank_that_hangs_is_told_of_by_its_neighbours() -> None:
    neighbour = failure(0, 5.0, "hang error: rank 0 has made no progress; rank 1 does not respond", about=1)
    found = blame([neighbour, failure(2, 6.0, RESET)], 3, {1: 1.0})
    assert found is not None and found["rank"] == 1 and "does not respond" in found["error"]
    own = failure(1, 7.0, "hang error: another rank raised the alarm", about=1)
    assert blame([neighbour, own], 2, {}) == own


def test_where_every_rank_lost_a_connection_none_is_said_to_be_the_cause() -> None:
    found = blame([failure(0, 5.0, RESET), failure(1, 4.0, RESET)], 2, {})
    assert found is not None and found["error"].startswith("no rank reports a cause")


def test_silence_alone_says_nothing_while_ranks_may_live() -> None:
    assert blame([], 2, {0: 1.0, 1: 2.0}) is None
    found = blame([], 2, {0: 2.0, 1: 1.0}, ended=True)
    assert found is not None and found["rank"] == 1 and "from rank 0 either" in found["error"]
    assert blame([], 0, {}, ended=True) is None


def write(run_dir: Path, *failures: dict[str, Any], life: str = "") -> None:
    """Files as the ranks of a start leave them."""
    (run_dir / "errors").mkdir(parents=True)
    (run_dir / "errors" / "life").write_text(life)
    for content in failures:
        (run_dir / "errors" / f"rank-{content['rank']:05d}.json").write_text(json.dumps(content))


def test_a_killed_rank_is_named_from_the_files_of_its_start(tmp_path: Path) -> None:
    """Four ranks: 3 tells of its connection; 0 and 2 are silent, and 2 was heard of first; 1 is of another start."""
    write(tmp_path, failure(3, 50.0, RESET), life="now 4")
    (tmp_path / "hang").mkdir()
    for rank, life, heard in ((0, "now", 40), (1, "before", 10), (2, "now", 30), (3, "now", 45)):
        beat = tmp_path / "hang" / f"rank-{rank:05d}.json"
        beat.write_text(json.dumps({"rank": rank, "life": life}))
        os.utime(beat, (heard, heard))
    assert first_failure_line(tmp_path).startswith("rank 1 failed first: died without a message")
    (tmp_path / "hang" / "rank-00001.json").write_text(json.dumps({"rank": 1, "life": "now"}))
    assert re.match("rank 2 failed first: died .* from rank 0, 1 either", first_failure_line(tmp_path))


def test_a_run_of_an_earlier_release_tells_its_ranks_in_run_json(tmp_path: Path) -> None:
    write(tmp_path, failure(1, 5.0, RESET), life="an older name")
    attempt = {"attempt": 1, "world_size": 2, "started": 1.0, "state": "failed"}
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [attempt]}))
    found = first_failure(tmp_path)
    assert found is not None and found["rank"] == 0


def test_where_the_number_of_ranks_is_not_known_a_broken_connection_is_called_that(tmp_path: Path) -> None:
    write(tmp_path, failure(1, 5.0, RESET))
    assert "no rank reports a cause" in first_failure_line(tmp_path)
    assert first_failure_line(tmp_path / "elsewhere") == ""
