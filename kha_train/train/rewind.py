"""Going back before a spike and leaving its data out: what PaLM's authors did by hand, done by the run itself.

The engine lives on: the checkpoint is read into it. Until the next save the skip window is in no checkpoint, which is
safe: a run that is killed in between starts from the same checkpoint, meets the same spike and decides the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kha_train.checkpoint import layout
from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.checkpoint.retention import is_marked, mark
from kha_train.config.schema import RunConfig
from kha_train.train.progress import restore_watch

if TYPE_CHECKING:
    from kha_train.train.session import Session


def go_back(session: Session) -> bool:
    """Return to the newest checkpoint at least `stability.rewind.margin` steps before the trouble, or else the newest
    before it, and pass over `stability.rewind.window` batches from its first sample on. Collective.

    The undone lines move to `metrics.discarded.jsonl`; newer checkpoints are removed, marked ones set aside. False,
    with a note in the record, when no checkpoint is left to go to.
    """
    trouble = session.watch.trouble()
    session.saver.wait()
    checkpoint = _checkpoint_before(session, trouble.step)
    if checkpoint is None:
        session.happened("rewind_impossible", session.progress.step, reason=trouble.reason)
        session.watch.go_on()
        return False
    options = session.config.stability.rewind
    window = (trouble.sample, trouble.sample + options.window * session.config.data.global_batch_size)
    undone_step, windows = session.progress.step, session.progress.skip_windows
    _remove_newer(session, checkpoint.step)
    session.restore(checkpoint)
    session.progress = replace(session.progress, skip_windows=tuple(sorted({*windows, window})))
    session.stream.skip_windows = session.progress.skip_windows
    with session.world.agreed("write the record"):
        restore_watch(session.watch, checkpoint, rewound=True)
        note = f"rewind {session.watch.rewinds} from step {undone_step}: {trouble.reason}"
        session.record.rewind_to(checkpoint.step, note)
    where = {"to_step": checkpoint.step, "window": list(window), "trouble_step": trouble.step}
    session.happened("rewind", undone_step, **where, reason=note)
    return True


def steps_to_keep(config: RunConfig, run_dir: Path, now: int) -> tuple[int, ...]:
    """The step of the checkpoint a rewind would go to if a spike began at step `now`; retention must not take it.

    Raises OSError when the directory cannot be read.
    """
    if config.stability.policy != "rewind":
        return ()
    horizon = now - config.stability.rewind.margin - config.stability.rewind.after
    steps = [step for step, _ in layout.candidates(run_dir / layout.FOLDER) if step <= horizon]
    return tuple(steps[:1])


def _checkpoint_before(session: Session, step: int) -> Checkpoint | None:
    """Of the last finished step before `step`, less the margin where one is that old."""
    margin = session.config.stability.rewind.margin
    for at_most in (step - 1 - margin, step - 1):
        checkpoint = find_newest(session.run_dir, session.world, session.console.warn, at_most)
        if checkpoint is not None:
            return checkpoint
    return None


def _remove_newer(session: Session, step: int) -> None:
    """Checkpoints of a future that is undone: a restart must not find them, but what a person marked is kept."""
    folder = session.run_dir / layout.FOLDER
    with session.world.agreed("remove checkpoints that a rewind undoes"):
        newer = [found for found in layout.candidates(folder) if found[0] > step] if session.world.is_main else []
        for undone, directory in newer:
            if is_marked(folder, undone):
                layout.set_aside(directory, undone, "undone")
                mark(folder, undone, keep=False)
            else:
                layout.remove(directory, undone)
