"""A long step is abandoned when a run is asked to stop; an ordinary step costs nothing and is finished."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kha_train.config.compose import compose
from kha_train.estimate.long_step import long_step_warning
from kha_train.estimate.plan import make_plan
from kha_train.operate.rehearse import Layout, rehearse
from kha_train.record import read_events, read_run
from kha_train.train.patience import Patience

WORKER = Path(__file__).with_name("stop_worker.py")


class Ranks:
    """A world of two ranks, of which this one is asked nothing and the other brings `other`; a clock beside it."""

    def __init__(self) -> None:
        self.size, self.now, self.asked, self.other = 2, 0.0, 0, (0, 0)

    def max_ints(self, *values: int) -> tuple[int, ...]:
        self.asked += 1
        return tuple(max(pair) for pair in zip(values, self.other, strict=True))


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def steps(ranks: Ranks, small: list[str]) -> Callable[..., Any]:
    """`steps(2, of=10, seconds=0.1)`: the micro-batch at which one of 2 steps was given up, or None; a first
    micro-batch takes `compile` seconds more."""
    said: list[str] = []
    stops: Any = SimpleNamespace(pending=lambda: False, check=lambda: None, tell_of_another=lambda: None, place="")
    patience = Patience(compose(small), ranks, stops, said.append, lambda: ranks.now)  # type: ignore[arg-type]
    begun = [0]

    def run(count: int, of: int, seconds: float, compiles: float = 0.0) -> int | None:
        for _ in range(count):
            begun[0] += 1
            patience.begin(begun[0])
            for number in range(1, of + 1):
                if patience.gives_up(number, of):
                    return number
                ranks.now += seconds + (compiles if begun[0] == number == 1 else 0)
        return None

    run.said, run.stops = said, stops  # type: ignore[attr-defined]
    return run


def test_ordinary_steps_agree_on_nothing_amid_them_once_a_micro_batch_is_known(
    ranks: Ranks, steps: Callable[..., Any]
) -> None:
    ranks.other = (1, 0)
    assert steps(1, of=8, seconds=0.1) is None and ranks.asked == 3
    assert steps(500, of=8, seconds=0.1) is None and ranks.asked == 3


def test_a_compiler_in_the_first_micro_batch_is_forgotten_by_the_third_step(
    ranks: Ranks, steps: Callable[..., Any]
) -> None:
    assert steps(2, of=8, seconds=0.1, compiles=60.0) is None
    before = ranks.asked
    assert steps(100, of=8, seconds=0.1) is None and ranks.asked == before


def test_a_step_of_one_micro_batch_asks_nothing(ranks: Ranks, steps: Callable[..., Any]) -> None:
    ranks.other = (1, 0)
    assert steps(3, of=1, seconds=500.0) is None and ranks.asked == 0


def test_a_long_step_asks_about_every_two_seconds_and_is_given_up_by_the_request_of_any_rank(
    ranks: Ranks, steps: Callable[..., Any]
) -> None:
    assert steps(1, of=10_000, seconds=0.1) is None
    first = ranks.asked
    assert 450 <= first <= 515
    assert steps(1, of=10_000, seconds=0.1) is None and 450 <= ranks.asked - first <= 515
    ranks.other = (1, 0)
    given_up = steps(1, of=10_000, seconds=0.1)
    assert given_up is not None and given_up <= 21
    assert steps.stops.place == f"micro-batch {given_up} of 10,000 of step 3"  # type: ignore[attr-defined]


def test_what_is_left_of_a_step_for_two_seconds_is_finished(ranks: Ranks, steps: Callable[..., Any]) -> None:
    ranks.other = (1, 0)
    assert steps(1, of=21, seconds=0.1) is None
    assert steps(1, of=60, seconds=0.1) == 21


def test_a_step_that_takes_minutes_is_warned_of_before_it_ends_and_names_the_fields(
    ranks: Ranks, steps: Callable[..., Any]
) -> None:
    assert steps(1, of=1_000, seconds=0.1, compiles=100.0) is None and steps.said == []  # type: ignore[attr-defined]
    assert steps(2, of=10_000, seconds=0.1) is None
    (words,) = steps.said  # type: ignore[attr-defined]
    assert words.startswith("a step takes about 16:40: 10,000 micro-batches of 4 rows on every rank")
    assert "data.global_batch_size" in words and "engine.micro_batch_size" in words


def test_a_step_whose_many_micro_batches_were_warned_of_is_only_timed_later(small: list[str], ranks: Ranks) -> None:
    said: list[str] = []
    stops: Any = SimpleNamespace(pending=lambda: False, check=lambda: None, place="")
    config = compose([*small, "data.global_batch_size=16000"])
    patience = Patience(config, ranks, stops, said.append, lambda: ranks.now)  # type: ignore[arg-type]
    patience.begin(1)
    for number in range(1, 2001):
        assert not patience.gives_up(number, 2000)
        ranks.now += 0.1
    assert len(said) == 2 and said[0].startswith("a step is 2,000 micro-batches of 4 rows")
    assert said[1] == "a step takes about 3:20"


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_a_step_up_together_and_the_run_goes_on_as_if_it_had_not_begun(
    stage: int, small: list[str], run_ranks: Callable[..., list[Any]], tmp_path: Path, curve: Callable[[Path], Any]
) -> None:
    overrides = [*small, "model.layers=1", "attention=kha_mlp", "engine.micro_batch_size=1", "run.steps=5"]
    overrides += [f"engine.zero_stage={stage}", "validation.every_steps=0", "checkpoint.every_steps=2"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    answers = run_ranks(
        WORKER, 2, overrides=overrides, straight=str(straight), stopped=str(stopped), ports=free_ports(5)
    )
    assert [answer["ends"] for answer in answers] == [[[5, True], [0, False], [3, False], [3, False], [5, True]]] * 2
    # The signals reach rank 1 alone; rank 0 says so once a stop.
    assert [answer["said"] for answer in answers] == [[3, 3], [0, 0]]
    assert curve(straight) == curve(stopped)
    # The average that the console shows goes on as well.
    states = [json.loads((run / "checkpoints/step-00000005/trainer.json").read_text()) for run in (straight, stopped)]
    assert states[0]["loss_average"] == states[1]["loss_average"] and states[0]["loss_average"]["weight"] > 4
    for path in (straight / "checkpoints/step-00000005").glob("*.safetensors"):
        assert path.read_bytes() == (stopped / "checkpoints/step-00000005" / path.name).read_bytes(), path.name
    events = [(event["kind"], event["step"]) for event in read_events(stopped)]
    # Nothing is saved before step 1, nor again what has been saved.
    assert [step for kind, step in events if kind == "step_given_up"] == [0, 3, 3]
    assert [step for kind, step in events if kind == "checkpoint_saved"] == [2, 3, 4, 5]
    assert [one["state"] for one in read_run(stopped)["attempts"]] == ["requeued", "requeued", "requeued", "done"]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def test_many_micro_batches_are_warned_of_before_a_run_by_plan_and_rehearsal(small: list[str]) -> None:
    overrides = [*small, "model.layers=1", "engine.device=cpu", "engine.micro_batch_size=1"]
    ordinary, many = (compose([*overrides, f"data.global_batch_size={rows}"]) for rows in (64, 4000))
    assert make_plan(ordinary).warning == "" and long_step_warning(ordinary, 64) == ""
    words = make_plan(many).to_dict()["warning"]
    assert words.startswith("a step is 4,000 micro-batches of 1 rows") and "data.global_batch_size (4,000)" in words
    answer = rehearse(many, [], Layout(2, 2))
    assert answer["batch"]["warning"].startswith("a step is 2,000 micro-batches")
    assert answer["rank_0"]["built"] and answer["rank_0"]["step_seconds_here"] > 0
    assert long_step_warning(ordinary, 64, 150.0).startswith("a step is expected to take 2:30: 64 micro-batches")
