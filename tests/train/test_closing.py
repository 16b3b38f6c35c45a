"""A run counts as done only if its last step was sound."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.engine.deepspeed import Engine
from kha_train.errors import DivergedError
from kha_train.record import Marker, has_marker, read_events, read_metrics, read_run, set_marker
from kha_train.train.closing import sum_up
from kha_train.train.run import train
from kha_train.train.session import Session

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(small: list[str], tmp_path: Path) -> Configure:
    """`configure(*overrides)`: six steps of a small model, saved after every second."""
    common = [*small, "model.layers=1", "run.steps=6", "checkpoint.every_steps=2", f"run.dir={tmp_path}/run"]
    return lambda *overrides: compose([*common, *overrides])


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`poison(5, 6)`: the gradients of these steps are not finite."""
    accumulate, judge_at = Engine.accumulate, Session.judge_at
    step, bad = [0], set[int]()

    def counted(session: Session, lr: float) -> Any:
        step[0] = session.progress.step + 1
        return judge_at(session, lr)

    def poisoned(engine: Engine, batch: Any, loss_scale: float, *scales: float, last: bool) -> Any:
        return accumulate(engine, batch, math.nan if step[0] in bad else loss_scale, *scales, last=last)

    monkeypatch.setattr(Session, "judge_at", counted)
    monkeypatch.setattr(Engine, "accumulate", poisoned)

    def choose(*steps: int) -> None:
        bad.clear()
        bad.update(steps)

    return choose


def test_a_run_that_is_ended_at_once_is_not_summed_up() -> None:
    session: Any = SimpleNamespace(world=SimpleNamespace(is_main=True))
    reporter: Any = SimpleNamespace(record=SimpleNamespace(has_steps=True))
    with pytest.raises(AttributeError, match="run_dir"):
        sum_up(session, reporter, DivergedError("diverged"))
    sum_up(session, reporter, KeyboardInterrupt())


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["observe", "skip", "rewind", "abort"])
def test_a_run_that_ends_on_a_step_that_was_not_finite_has_diverged(
    policy: str, configure: Configure, poison: Callable[..., None], tmp_path: Path
) -> None:
    poison(6)
    with pytest.raises(DivergedError, match="non-finite steps in a row, the last one at step 6") as error:
        train(configure(f"stability={policy}"))
    run_dir = tmp_path / "run"
    assert error.value.exit_code == 5
    assert has_marker(run_dir, Marker.FATAL) and not has_marker(run_dir, Marker.DONE)
    assert [line["train/skipped"] for line in read_metrics(run_dir)] == [0, 0, 0, 0, 0, 1]
    assert read_run(run_dir)["attempts"][-1]["state"] == "diverged"
    assert [event["kind"] for event in read_events(run_dir)].count("abort") == 1
    assert saved(run_dir) == ["step-00000002", "step-00000004"]
    # The cause is fixed: the run continues from the last checkpoint to its end.
    poison()
    assert train(configure(f"stability={policy}")).finished and has_marker(run_dir, Marker.DONE)


@pytest.mark.slow
def test_a_run_that_recovers_by_its_last_step_is_done(
    configure: Configure, poison: Callable[..., None], tmp_path: Path
) -> None:
    poison(1, 2, 5)
    assert train(configure()).finished
    assert has_marker(tmp_path / "run", Marker.DONE)


def test_a_run_of_which_no_step_was_applied_has_diverged(configure: Configure, tmp_path: Path) -> None:
    """The reported case: weights so large that nothing is finite, and fewer steps than the policy's limit."""
    with pytest.raises(DivergedError, match="9 non-finite steps in a row, the last one at step 9"):
        train(configure("run.steps=9", "model.init_std=1e30", "stability.max_nonfinite_steps=10"))
    assert has_marker(tmp_path / "run", Marker.FATAL) and not has_marker(tmp_path / "run", Marker.DONE)


@pytest.mark.slow
def test_a_stop_amid_steps_that_are_not_finite_is_a_stop_and_the_count_goes_on(
    configure: Configure, poison: Callable[..., None], tmp_path: Path
) -> None:
    poison(3, 4, 5, 6)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for _ in range(4):
        set_marker(run_dir, Marker.STOP)
        assert not train(configure("stability.max_nonfinite_steps=3")).finished and has_marker(run_dir, Marker.REQUEUE)
    with pytest.raises(DivergedError, match="3 steps in a row"):
        train(configure("stability.max_nonfinite_steps=3"))


@pytest.mark.slow
def test_a_checkpoint_of_an_end_that_was_not_finite_is_not_taken_for_a_done_run(
    configure: Configure, poison: Callable[..., None], tmp_path: Path
) -> None:
    """Stopped at step 4, in the middle; then its configuration says that four were all."""
    poison(4)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for _ in range(4):
        set_marker(run_dir, Marker.STOP)
        train(configure())
    assert saved(run_dir)[-1] == "step-00000004"
    with pytest.raises(DivergedError, match="the last one at step 4"):
        train(configure("run.steps=4", "resume.allow_changes=[run.steps]"))
    assert not has_marker(run_dir, Marker.DONE)
