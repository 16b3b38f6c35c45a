"""Goes back before a spike and skips its data, as PaLM's authors did by hand.

The engine stays: the checkpoint is read into it. Until the next save no checkpoint contains the skip window. That is
safe: a run that is killed in between starts from the same checkpoint, meets the same spike and makes the same decision.
"""

from __future__ import annotations

from dataclasses import replace

from kha_train.checkpoint import layout
from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.checkpoint.retention import is_marked, mark
from kha_train.train.progress import restore_watch
from kha_train.train.reporter import Reporter
from kha_train.train.session import Session


def go_back(session: Session, reporter: Reporter) -> bool:
    """Return to the newest checkpoint at least `stability.rewind.margin` steps before the trouble, or else the newest
    before it, and skip `stability.rewind.window` batches from its first sample on. Collective; no save may be in
    flight.

    The undone lines move to `metrics.discarded.jsonl`; newer checkpoints are removed, marked ones are set aside.
    Returns False, with an event in the record, when there is no checkpoint to go back to.
    """
    trouble = session.watch.trouble()
    checkpoint = _checkpoint_before(session, reporter, trouble.step)
    if checkpoint is None:
        reporter.happened("rewind_impossible", session.progress.step, reason=trouble.reason)
        session.watch.go_on()
        return False
    options = session.config.stability.rewind
    rows = session.config.data.batch_sizes.total(trouble.step, trouble.step + options.window - 1)
    window = (trouble.sample, trouble.sample + rows)
    undone_step, windows = session.progress.step, session.progress.skip_windows
    _remove_newer(session, checkpoint.step)
    session.restore(checkpoint)
    session.progress = replace(session.progress, skip_windows=tuple(sorted({*windows, window})))
    session.stream.skip_windows = session.progress.skip_windows
    with session.world.agreed("write the record"):
        restore_watch(session.watch, checkpoint, rewound=True)
        note = f"rewind {session.watch.rewinds} from step {undone_step}: {trouble.reason}"
        reporter.record.rewind_to(checkpoint.step, note)
    where = {"to_step": checkpoint.step, "window": list(window), "trouble_step": trouble.step}
    reporter.happened("rewind", undone_step, **where, reason=note)
    return True


def _checkpoint_before(session: Session, reporter: Reporter, step: int) -> Checkpoint | None:
    """The checkpoint of the last finished step before `step`, minus the margin if there is one that old."""
    margin = session.config.stability.rewind.margin
    for at_most in (step - 1 - margin, step - 1):
        checkpoint = find_newest(session.run_dir, session.world, reporter.console.warn, at_most)
        if checkpoint is not None:
            return checkpoint
    return None


def _remove_newer(session: Session, step: int) -> None:
    """Remove checkpoints that the rewind undoes, so that a restart does not find them; marked ones are kept aside."""
    folder = session.run_dir / layout.FOLDER
    with session.world.agreed("remove checkpoints that a rewind undoes"):
        newer = [found for found in layout.candidates(folder) if found[0] > step] if session.world.is_main else []
        for undone, directory in newer:
            if is_marked(folder, undone):
                layout.set_aside(directory, undone, "undone")
                mark(folder, undone, keep=False)
            else:
                layout.remove(directory, undone)
