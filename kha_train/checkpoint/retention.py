"""Selects which checkpoints are kept, and deletes the others without ever risking the last good one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kha_train.checkpoint import layout
from kha_train.checkpoint.hold import alone
from kha_train.checkpoint.manifest import Manifest
from kha_train.checkpoint.reader import check_sizes
from kha_train.checkpoint.writer import no_stage
from kha_train.errors import CheckpointError, ConfigError
from kha_train.record.files import sync_directory

MARK_SUFFIX = ".keep"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept: the `last` newest valid ones, one at every multiple of `every` (0: none), and the
    `steps` listed.

    Marked ones (see `mark`) are kept too. Raises ConfigError when `last` < 1.
    """

    last: int
    every: int = 0
    steps: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(
                "at least one must be kept", field="checkpoint.keep_last", value=self.last, allowed=">= 1"
            )

    def permanent(self, step: int, folder: Path) -> bool:
        """Whether the checkpoint of `step` is kept whatever its age."""
        return step in self.steps or (self.every > 0 and step % self.every == 0) or is_marked(folder, step)


def mark(folder: Path, step: int, keep: bool) -> None:
    """Make the checkpoint of `step` in `folder` permanent, or undo that. The mark is a file beside it. Raises
    OSError.
    """
    path = folder / f"{layout.step_name(step)}{MARK_SUFFIX}"
    if keep:
        path.touch()
    else:
        path.unlink(missing_ok=True)
    sync_directory(folder)


def is_marked(folder: Path, step: int) -> bool:
    """Whether somebody marked the checkpoint of `step` as permanent."""
    return (folder / f"{layout.step_name(step)}{MARK_SUFFIX}").exists()


def prune(
    run_dir: Path,
    keep: Keep,
    *,
    check: Callable[[Path], Manifest] = check_sizes,
    stage: Callable[[str], None] = no_stage,
    dry_run: bool = False,
) -> list[int]:
    """Delete every valid checkpoint that `keep` does not select; returns the deleted steps. Local: one process calls
    it.

    `check` raises CheckpointError for an invalid directory. Use `check_sizes` after a save, whose bytes were hashed
    while they were written; `reader.verify` reads every byte. Invalid directories are neither counted nor deleted, so
    the newest valid one is always kept. A checkpoint that another run is reading (`hold.held`) is left for the next
    call. With `dry_run` nothing is deleted. `stage` is called with "before_prune" and, during each deletion,
    "mid_prune": fault tests end the process there. Raises OSError when a directory cannot be
    removed.
    """
    folder = Path(run_dir) / layout.FOLDER
    surplus = _surplus(folder, keep, check)
    if dry_run:
        return [step for step, _ in surplus]
    stage("before_prune")
    removed = []
    for step, directory in surplus:
        # Another process may remove the same ones.
        with suppress(FileNotFoundError), alone(directory) as free:
            if free:
                layout.remove(directory, step, lambda: stage("mid_prune"))
                removed.append(step)
    layout.clear_leftovers(folder, "deleting")
    return removed


def _surplus(folder: Path, keep: Keep, check: Callable[[Path], Manifest]) -> list[tuple[int, Path]]:
    """The valid directories that may be deleted, oldest first."""
    kept: set[int] = set()
    newest = 0
    surplus = []
    for step, directory in layout.candidates(folder):
        try:
            check(directory)
        except (CheckpointError, OSError):
            continue
        if step not in kept and (newest < keep.last or keep.permanent(step, folder)):
            newest += newest < keep.last
            kept.add(step)
        else:
            surplus.append((step, directory))
    return surplus[::-1]
