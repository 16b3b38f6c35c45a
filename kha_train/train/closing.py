"""Ends an attempt, normally or after an error: the summary of the run, the marker, the end of the record."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from kha_train.analysis.curve_points import field_of
from kha_train.analysis.ending import end_of
from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.errors import DataError, DivergedError, KhaError
from kha_train.record import Record, Redactor, mark_fatal
from kha_train.train.failure import forget_failures
from kha_train.train.reporter import Reporter
from kha_train.train.session import Attempt, Session


def check_end(session: Session, reporter: Reporter) -> None:
    """Before the last step is saved: raises DivergedError on all ranks when the run must not count as done."""
    try:
        session.watch.check_end(session.progress.step, session.progress.skipped_steps)
    except DivergedError as error:
        reporter.happened("abort", session.progress.step, reason=error.problem)
        raise


def sum_up(session: Session, reporter: Reporter, error: BaseException | None) -> None:
    """Write the results of the whole run to `run.json`, the sinks and the console.

    This takes longer for a longer record, so a process that must end at once skips it.
    """
    if not (session.world.is_main and reporter.record.has_steps) or isinstance(error, KeyboardInterrupt):
        return
    with _after(error):
        ending = end_of(session.run_dir, isinstance(error, DivergedError), session.watch.monitor)
        reporter.record.update_run(spikes=ending.report.summary)
        points = ending.report.curve.points
        losses = list(zip(field_of(points, "step").tolist(), field_of(points, "loss").tolist(), strict=True))
        reporter.sinks.spikes(ending.report.to_dict()["events"], ending.actions, losses)
        reporter.sinks.summary(ending.summary())
        if error is None:
            steps = session.config.run.steps
            finished = session.progress.step >= steps
            reporter.console.final(ending.rows(steps), ending.next_command() if finished else "")


def close_record(
    config: RunConfig, world: World, attempt: Attempt, record: Record, error: BaseException | None
) -> None:
    """Set FATAL if `error` would happen again, and record the goodput and how the attempt ended.

    A command that is refused for its settings before an attempt begins changes nothing of the run, and removes the
    directories that it made: the error concerns the command, not the run.
    """
    run_dir = Path(config.run.dir)
    if not record.in_attempt and _is_refusal(error):
        record.withdraw()
        return
    with _after(error):
        if world.is_main and error and not attempt.is_accepted:
            # Those of an earlier start would look like the cause of this end.
            forget_failures(run_dir, world)
    if isinstance(error, DivergedError):
        attempt.end_state = "diverged"
    with _after(error):
        if world.is_main and isinstance(error, KhaError) and error.fatal:
            mark_fatal(run_dir, Redactor.from_environment().text(error.line()))
    with _after(error):
        if record.in_attempt and (summary := record.goodput()):
            record.update_run(goodput=summary.to_dict())
    with _after(error):
        record.close(attempt.end_state)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether `error` concerns the command. Damaged data and checkpoints (exit 4) would fail any command."""
    return isinstance(error, KhaError) and error.fatal and error.exit_code != DataError.exit_code


def _after(error: BaseException | None) -> AbstractContextManager[None]:
    """Around the work at the end of an attempt: if that fails too, `error`, which ended the attempt, is still the one
    raised.
    """
    return suppress(OSError, KhaError) if error else nullcontext()
