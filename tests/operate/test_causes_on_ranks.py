"""An event of a run on two ranks is explained by replays on two ranks, from a checkpoint that its ring wrote."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis.runs import load_run
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.operate import stretch
from kha_train.operate.causes import Replaying, event_of, place_of, replay_event
from kha_train.operate.stretch import Job
from kha_train.record import read_events, read_run
from tests.operate.planted import BATCH, poisoned_data, settings

RANKS, BAD = 2, 130
WORKER = Path(__file__).with_name("ranks_worker.py")


def test_poisoned_rows_are_named_on_two_ranks_from_a_state_of_the_ring(
    run_ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretch, "processors", lambda: RANKS)

    def launch(job: Job, place: Path, watch: Callable[[int], None]) -> None:
        assert job.ranks == RANKS
        assert run_ranks(WORKER, RANKS, config=to_plain(job.config), until=job.until) == [job.until] * RANKS

    data = poisoned_data(tmp_path / "data", 0, BAD)
    sharded = ("engine.name=deepspeed", "engine.zero_stage=2", f"engine.micro_batch_size={BATCH // RANKS}")
    config = compose(settings(data, tmp_path / "run", 0, *sharded))
    launch(Job(config, BAD + 6, RANKS, ""), tmp_path, lambda step: None)
    run = load_run(tmp_path / "run")
    [saved] = [one for one in read_events(run.path) if one["kind"] == "ring_saved"]
    assert (saved["step"], saved["steps"]) == (BAD, [BAD - 6, BAD - 2])

    event = event_of(run, None, BAD)
    arms, bar = ("without_batch", "half_rate", "rounding"), lambda what, total: nullcontext(lambda done: None)
    how = Replaying(arms, place_of(run, event), lambda text: None, bar, 1, 3, launch)
    found = replay_event(run, event, how)
    assert found.differences == () and found.first == BAD - 1 and Path(found.source).parents[1].name == "ring"
    assert (found.cause, [arm.removes for arm in found.arms]) == ("data", [True, False, False]), found
    control = read_run(place_of(run, event) / "control" / "run")
    assert [attempt["world_size"] for attempt in control["attempts"]] == [RANKS]
