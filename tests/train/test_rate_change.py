"""A resumed run reports how another schedule changes its learning rate, and refuses a jump that was not allowed."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kha_train.config.build import build, to_plain
from kha_train.config.compose import compose, compose_at_home
from kha_train.config.schema import RunConfig, ScheduleSection
from kha_train.errors import ResumeError
from kha_train.record import Marker, read_events, read_metrics, set_marker
from kha_train.train.rate_change import LARGEST_JUMP, SAME, rate_change, ways
from kha_train.train.run import train

pytestmark = pytest.mark.slow

Stopped = Callable[..., tuple[Path, Callable[..., None]]]
OWN = ("owner.json", ".lock", ".ranks")
LR = 2e-3


@pytest.fixture(scope="module")
def stopped(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """`stopped(step, *overrides)` is the directory of a run of ten steps that stopped after `step`, and
    `go_on(*changes)`, which starts it again."""

    def make(step: int, *overrides: str) -> tuple[Path, Callable[..., None]]:
        run_dir = tmp_path_factory.mktemp("stopped") / "run"
        run_dir.mkdir()
        common = [
            *small, "model.layers=1", "data.global_batch_size=4", f"run.dir={run_dir}", "run.steps=10",
            f"optim.lr={LR}", f"checkpoint.every_steps={step}", "validation.every_steps=0", *overrides,
        ]  # fmt: skip

        def go_on(*changes: str) -> None:
            assert train(compose([*common, *changes])).finished

        train(compose(common))
        if step < 10:
            shutil.rmtree(run_dir / "checkpoints" / "step-00000010")
        return run_dir, go_on

    return make


def _content(run_dir: Path) -> dict[str, bytes]:
    files = {path.relative_to(run_dir): path for path in run_dir.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if name.parts[0] not in OWN}


def _refusal(go_on: Callable[..., None], *changes: str) -> tuple[str, list[list[str]]]:
    """The error, and the overrides that each way in its fix adds to the command."""
    with pytest.raises(ResumeError) as refused:
        go_on(*changes)
    typed = [shlex.split(way.typed) for way in refused.value.typed_fixes]
    return str(refused.value), [way for way in typed if "resume.allow_changes" in str(way)]


def _rates(run_dir: Path) -> list[float]:
    return [line["train/lr"] for line in read_metrics(run_dir)]


@pytest.mark.parametrize(
    ("step", "schedule", "before", "now"),
    [
        # At its end a cosine stands at a tenth; in step 11 of 20 it stands at 0.1 + 0.45 (1 + cos(0.55 pi)).
        (10, ("optim.schedule.warmup=0",), 0.1 * LR, LR * (0.1 + 0.45 * (1 + math.cos(0.55 * math.pi)))),
        # The tenth of ten warm-up steps was the peak, the eleventh of twenty is a little above half of it.
        (10, ("optim.schedule.warmup=1",), LR, 0.55 * LR),
        # A decay that is over, and one that has yet to begin.
        (10, ("optim.schedule.name=wsd", "optim.schedule.warmup=0"), 0.1 * LR, LR),
    ],
)
def test_a_longer_run_whose_rate_would_jump_is_refused_and_both_ways_that_are_named_work(
    stopped: Stopped, step: int, schedule: tuple[str, ...], before: float, now: float
) -> None:
    run_dir, go_on = stopped(step, *schedule)
    untouched = _content(run_dir)
    for asked in (("run.steps=20", "resume.allow_changes=[run.steps]"), ("run.steps=20",)):
        told, (keep, jump) = _refusal(go_on, *asked)
        assert f"{before:.3g}" in told and f"{now:.3g}" in told
        assert _content(run_dir) == untouched
    copy = run_dir.with_name("copy")
    shutil.copytree(run_dir, copy)
    go_on("run.steps=20", *jump)
    assert _rates(run_dir)[step] == pytest.approx(now)
    go_on("run.steps=20", *keep, f"run.dir={copy}")
    assert _rates(copy)[step] == pytest.approx(before, rel=SAME)
    assert len(_rates(copy)) == 20 and _rates(copy)[-1] == pytest.approx(0.1 * before, rel=0.01)


def test_a_constant_rate_is_extended_from_the_last_step_before_its_decay(stopped: Stopped) -> None:
    run_dir, go_on = stopped(8, "optim.schedule.name=wsd", "optim.schedule.warmup=0.1")
    go_on("run.steps=16", "resume.allow_changes=[run.steps]")
    assert _rates(run_dir)[:13] == [LR] * 13


def test_the_same_schedule_says_nothing(stopped: Stopped, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, go_on = stopped(5)
    go_on()
    assert "learning rate" not in capfd.readouterr().out
    assert "learning_rate_changed" not in {event["kind"] for event in read_events(run_dir)}


def test_a_small_change_of_the_rate_is_said_recorded_and_made(
    stopped: Stopped, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, go_on = stopped(5, "optim.schedule.warmup=0")
    before, now = (LR * (0.1 + 0.45 * (1 + math.cos(math.pi * 6 / steps))) for steps in (10, 11))
    assert now / before < LARGEST_JUMP
    go_on("run.steps=11", "resume.allow_changes=[run.steps]")
    told = f"the learning rate of step 6: {now:.3g} now, {before:.3g} by the checkpoint's schedule; step 5 had 0.0011"
    assert f"note: {told}\n" in capfd.readouterr().out
    (event,) = [event for event in read_events(run_dir) if event["kind"] == "learning_rate_changed"]
    assert (event["step"], event["planned"], event["now"]) == (5, pytest.approx(before), pytest.approx(now))
    assert _rates(run_dir)[5] == pytest.approx(now)


def test_a_shorter_run_whose_rate_would_fall_at_once_is_refused_too(stopped: Stopped) -> None:
    _, go_on = stopped(5, "optim.schedule.warmup=0")
    told, _ = _refusal(go_on, "run.steps=6", "resume.allow_changes=[run.steps]")
    assert "step 6: 0.0002 now, 0.000822 by the checkpoint's schedule; step 5 had 0.0011" in told


def test_a_changed_rate_is_accepted_by_its_own_name(stopped: Stopped, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, go_on = stopped(5, "optim.schedule.name=wsd", "optim.schedule.decay=0")
    set_marker(run_dir, Marker.REQUEUE, "")
    told, _ = _refusal(go_on, "optim.lr=0.02")
    assert f" run.dir={run_dir} 'resume.allow_changes=[optim.lr]' allows the jump of the rate" in told
    go_on("optim.lr=0.02", "resume.allow_changes=[optim.lr]")
    assert "the learning rate of step 6: 0.02 now, 0.002 by" in capfd.readouterr().out
    assert _rates(run_dir)[5] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("schedule", "effect", "rates"),
    [
        ("optim.schedule.warmup=0", " keeps the rate, and lets it decay again", [2e-4, 2e-4]),
        ("optim.schedule.name=wsd optim.schedule.decay=0", "", [LR, LR]),
        ("optim.schedule.warmup=0 optim.schedule.final=0", " allows the jump of the rate", [0, 0.25 * LR]),
    ],
)
def test_what_a_finished_run_says_of_training_longer_goes_on_with_that_very_run(
    schedule: str, effect: str, rates: list[float], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    typed = [*small, "model.layers=1", "data.global_batch_size=4", "validation.every_steps=0", "run.steps=3"]
    typed += [f"optim.lr={LR}", *schedule.split()]
    run_dir = train(compose_at_home(typed)).run_dir
    capfd.readouterr()
    assert train(compose_at_home(typed)).finished
    told, hint = re.findall(r"(to train longer.*)\n  (.*)\n", capfd.readouterr().out)[0]
    assert effect in told and ("in a way" in told) == bool(effect) and "resume.allow_changes" not in told
    outcome = train(compose_at_home([*typed, *shlex.split(hint)]))
    assert (outcome.step, outcome.run_dir) == (6, run_dir) and list(Path("runs").iterdir()) == [run_dir]
    assert _rates(run_dir)[2:4] == pytest.approx(rates)


SHARES = st.floats(0, 1)
SCHEDULES = st.builds(ScheduleSection, name=st.just("cosine"), warmup=SHARES, final=SHARES) | st.builds(
    lambda warmup, decay, final: ScheduleSection(name="wsd", warmup=warmup, decay=decay * (1 - warmup), final=final),
    SHARES, SHARES, SHARES,
)  # fmt: skip


@given(SCHEDULES, SCHEDULES, st.integers(1, 300_000), st.integers(1, 300_000), st.integers(1, 10**6))
def test_the_way_that_keeps_the_rate_keeps_it_for_every_schedule(
    saved: ScheduleSection, now: ScheduleSection, steps: int, step: int, more: int
) -> None:
    step = min(step, steps)
    before, after = (_config(schedule, count) for schedule, count in ((saved, steps), (now, step + more)))
    change = rate_change(after, to_plain(before), step)
    if change is None or not change.is_jump or change.nearest < 1e-300:
        return
    settings = dict(text.split("=") for text in shlex.split(ways(after, change, ["run.steps"])[0].typed))
    assert (settings["run.dir"], settings["resume.allow_changes"]) == (after.run.dir, "[run.steps,optim]")
    schedule = ScheduleSection(
        name="wsd",
        warmup=float(settings["optim.schedule.warmup"]),
        decay=float(settings["optim.schedule.decay"]),
        final=now.final,
    )
    kept = replace(after, optim=replace(after.optim, lr=float(settings["optim.lr"]), schedule=schedule))
    assert build(RunConfig, to_plain(kept)) == kept
    again = rate_change(kept, to_plain(before), step)
    assert again is None or again.now == pytest.approx(change.nearest, rel=SAME)


DEFAULT = compose()


def _config(schedule: ScheduleSection, steps: int) -> RunConfig:
    run, optim = replace(DEFAULT.run, steps=steps), replace(DEFAULT.optim, schedule=schedule)
    return replace(DEFAULT, run=run, optim=optim)
