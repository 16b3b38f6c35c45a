"""The training loop, from the first step (or the newest checkpoint) to the last."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from kha_train import distributed
from kha_train.config.schema import RunConfig
from kha_train.config.validate_ranks import validate_batch
from kha_train.distributed import World
from kha_train.engine.contract import Engine
from kha_train.engine.default import engine_for
from kha_train.literal import say
from kha_train.optim import learning_rate
from kha_train.output import harmless_output
from kha_train.record import Marker, clear_marker, has_marker, leave_outcome, set_marker
from kha_train.telemetry.startup import Startup
from kha_train.train import layer_statistics
from kha_train.train.closing import check_end
from kha_train.train.failure import FailureFile
from kha_train.train.memory import explained_when_out_of_memory
from kha_train.train.opening import Finished, Opened, open_attempt
from kha_train.train.patience import Patience
from kha_train.train.preempt import StopRequests
from kha_train.train.rate_change import train_longer
from kha_train.train.rewind import go_back
from kha_train.train.saving import Saver
from kha_train.train.session import Attempt, Session
from kha_train.train.step import StepGivenUp, next_batch, train_step
from kha_train.train.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `finished` when all steps are trained, else it stopped in good order and can be resumed."""

    finished: bool
    step: int
    run_dir: Path


def train(
    config: RunConfig,
    startup: Startup | None = None,
    engine_class: type[Engine] | None = None,
    until: int | None = None,
) -> Outcome:
    """Run `config` from where its run directory stands. Called by every rank; returns or raises the same on each.
    `startup` has what was done before, for the record. `engine_class` replaces the engine that `engine.name` selects.
    After step `until`, if given, the run saves and stops in good order; its schedule remains that of `run.steps`.

    Raises ConfigError (cannot run: exit 2), ResumeError (the checkpoint is another run's: 3), DataError or
    CheckpointError (4), DivergedError (5), RunDirectoryInUse (6), MachineError (75: try again). A hang ends the process
    itself (75).
    """
    startup = startup or Startup()
    startup.mark("torch and the trainer")
    world = distributed.start(config.engine.device, config.engine.collective_timeout_seconds)
    startup.mark("process group")
    with ExitStack() as left_last:
        left_last.enter_context(harmless_output())
        left_last.push(lambda kind, error, trace: distributed.stop(error))
        validate_batch(config, world.size)
        engine_class = engine_class or engine_for(config, world.size)
        run_dir = Path(config.run.dir)
        stops = StopRequests(run_dir if world.is_main else None, config.run.max_minutes)
        watchdog = Watchdog(run_dir, world, config.engine.hang_timeout_seconds)
        world = replace(world, alive=watchdog.alive)
        with stops, FailureFile(run_dir, world):
            attempt = Attempt()
            with (
                explained_when_out_of_memory(config, world, lambda: attempt.has_updated),
                open_attempt(config, world, startup, engine_class, attempt) as opened,
            ):
                if isinstance(opened, Finished):
                    outcome = _already_over(config, world, opened.step)
                else:
                    outcome = _train_and_mark_the_end(opened, stops, watchdog, until)
        if world.is_main and not outcome.finished:
            say(f"stopped in good order after step {outcome.step}; the same command continues from there", err=True)
        return outcome


def _already_over(config: RunConfig, world: World, steps: int) -> Outcome:
    """All `steps` were trained before: report it, and change nothing."""
    run_dir = Path(config.run.dir)
    if world.is_main:
        say(f"{config.run.name}: all {steps} steps are trained already, nothing to do in {run_dir}")
        way = train_longer(config, steps)
        effect = way.shown.removeprefix("{}").strip()
        say(f"to train longer{f', in a way that {effect}' if effect else ''}, add (see docs/resume.md, Train longer):")
        say(f"  {way.typed}")
        say(f"to look at it: kha compare {shlex.quote(str(run_dir))}")
        leave_outcome("done")
    return Outcome(True, steps, run_dir)


def _train_and_mark_the_end(opened: Opened, stops: StopRequests, watchdog: Watchdog, until: int | None) -> Outcome:
    """Train, wait for the last save, and mark the end."""
    session, reporter, saver, _ = opened
    world = session.world
    with watchdog:
        finished = _train(opened, stops, watchdog, until)
        world.raise_together(reporter.trouble)
        watchdog.beat(session.progress.step, "ending")
        stops.place = "the end of the run"
        saver.finish()
        world.raise_together(reporter.trouble)
        stops.check()
        with world.agreed("mark the end"):
            _mark_the_end(session.run_dir, world, finished, session.progress.step)
        session.attempt.end_state = "done" if finished else "requeued"
        return Outcome(finished, session.progress.step, session.run_dir)


def _train(opened: Opened, stops: StopRequests, watchdog: Watchdog, until: int | None) -> bool:
    """Train until `run.steps` steps are done (True), or step `until` is or a rank asks to stop (False), and save that
    moment.
    """
    session, reporter, saver, ring = opened
    config, world = session.config, session.world
    steps = config.run.steps
    patience = Patience(config, world, stops, reporter.console.warn)
    while session.progress.step < steps:
        watchdog.beat(session.progress.step + 1, "training")
        started = time.perf_counter()
        with reporter.data_wait.measured():
            batch, labels = next_batch(session.stream, world, reporter.trouble)
        lr = learning_rate(config.optim, session.progress.step + 1, steps)
        observed = layer_statistics.is_due(config, session.progress.step + 1)
        patience.begin(session.progress.step + 1)
        try:
            with reporter.profiler.over(session.progress.step + 1):
                result = train_step(session.engine, batch, labels, lr, session.judge_at(lr), patience, observed)
        except StepGivenUp as given_up:
            _give_up(opened, str(given_up))
            return False
        reporter.note_startup()
        session.advance(result.applied)
        line = reporter.line(session, saver, result, lr, time.perf_counter() - started)

        step = session.progress.step
        watchdog.beat(step, "validating and saving")
        stop = _told(stops, result.stop, step)
        if tasks := session.tasks_due():
            stops.place = f"the validation after step {step:,}"
            line |= session.evaluate(tasks)
            (asked,) = world.max_ints(int(stop or stops.pending()))
            stop = _told(stops, bool(asked), step)
        reporter.report(line, session.watch.happenings(result.evidence))
        ring.after(step)
        if _obey(opened):
            continue
        stop = stop or step == until
        if step == steps:
            check_end(session, reporter)
        saver.poll()
        if stop or saver.due(step):
            _save(session, saver)
        if stop and step < steps:
            return False
    # Also for a run that was killed between its last save and its end.
    check_end(session, reporter)
    return True


def _obey(opened: Opened) -> bool:
    """Carry out the decision about the step just finished; returns whether the run went back to an earlier one.

    Raises DivergedError on all ranks when the run must end.
    """
    session, reporter, saver, ring = opened
    if session.watch.decision.then == "rewind":
        saver.wait()
        if go_back(session, reporter):
            ring.forget()
            return True
    if session.watch.decision.then == "abort":
        reporter.happened("abort", session.progress.step, reason=session.watch.decision.reason)
    session.watch.check()
    return False


def _save(session: Session, saver: Saver) -> None:
    """Begin a checkpoint of the current state. The saver reports when it is published, or has failed."""
    saver.begin(session.progress.step, session.engine, session.state(), session.resumed_from)


def _told(stops: StopRequests, stop: bool, step: int) -> bool:
    """`stop`, on which all ranks agreed after `step`, once the user has been told."""
    stops.place = f"what follows step {step:,}" + ("" if stop else ", and the next one")
    if stop:
        stops.tell_of_another()
    return stop


def _give_up(opened: Opened, where: str) -> None:
    """The current step was discarded `where` the run was asked to stop: record it, and save the previous state if it is
    not saved yet. Before the first step of a run or a branch there is nothing to save: the next start begins it again.
    """
    session, reporter, saver, _ = opened
    step, begun_after = session.progress.step, session.origin["step"] if session.origin else 0
    reporter.happened("step_given_up", step, where=where)
    if step > begun_after and step not in session.resumed_from and not saver.holds(step):
        _save(session, saver)


def _mark_the_end(run_dir: Path, world: World, finished: bool, step: int) -> None:
    """Mark how the attempt ended, for the launcher of the job and for users of the run."""
    if not world.is_main:
        return
    by_user = has_marker(run_dir, Marker.STOP)
    clear_marker(run_dir, Marker.STOP)
    if finished:
        set_marker(run_dir, Marker.DONE, f"step {step}")
    else:
        set_marker(run_dir, Marker.REQUEUE, f"step {step}, by {'the STOP file' if by_user else 'a signal'}")
    # A batch script requeues what SLURM interrupted, but not what its user stopped.
    leave_outcome("done" if finished else "stopped" if by_user else "requeue")
